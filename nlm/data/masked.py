"""What an encoder learns from: tokens to be found from what is before and after them."""

import torch
from torch import Tensor

from nlm.batch import KEPT
from nlm.random import uniform

MASK, RANDOM = 0.8, 0.1
"""Of the tokens to be predicted, the share in whose place the mask is read, and a random token; the others stay."""


def stand_ins(tokens: Tensor, keys: Tensor, vocab_size: int, share: float) -> Tensor:
    """Tokens [B S], random numbers of the rows [B] -> [B S]: for a random `share` of the places what is read there,
    KEPT elsewhere (Devlin et al. 2018, BERT, arXiv:1810.04805, section 3.1). The mask is the vocabulary's last token.
    """
    places = torch.arange(3 * tokens.shape[1], device=tokens.device).view(3, -1) + 2**31  # no numbers of sublayers
    chosen, way, other = (uniform(keys[:, None], numbers) for numbers in places)
    read = tokens.where(way >= MASK + RANDOM, (other * (vocab_size - 1)).long())
    return read.where(way >= MASK, vocab_size - 1).where(chosen < share, KEPT)
