"""An encoder's text: windows that follow one another, with tokens hidden as in training, but always the same ones."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from nlm.config import Config
from nlm.data.masked import stand_ins
from nlm.evaluate.windows import Row, rows
from nlm.random import row_keys

SEED = 0
"""Of what is hidden, whatever the run's: so that all runs on the same tokens are asked for the same ones."""


def masked_rows(documents: Iterable[NDArray[np.integer]], config: Config, window: int) -> Iterator[Row]:
    """Documents [n] each -> their windows, of which the last moves back to be as long as the others, and is asked for
    what no other has. What is hidden depends on the number of the window among all, and on its length."""
    # A row's last token is nobody's input.
    found = (row for tokens in documents for row in rows(np.append(tokens, 0), window, window))
    for number, row in enumerate(found):
        tokens = np.zeros(window + 1, np.int64)  # as long as any: the places of all have the same random numbers
        tokens[: len(row.tokens)] = row.tokens
        keys = row_keys(SEED, torch.tensor([number]))
        read = stand_ins(torch.from_numpy(tokens)[None], keys, config.model.vocab_size, config.train.masked_share)
        yield row._replace(stand_ins=read[0, : len(row.tokens)].numpy())
