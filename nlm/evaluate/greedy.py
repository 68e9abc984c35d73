"""The most likely continuation, in any layout without a pipeline."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nlm.cache import Cache
from nlm.evaluate.predictions import choice
from nlm.parallel.engine import Inference


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # of growing shapes
def greedy(inference: Inference, tokens: Sequence[int], n: int, ends: Callable[[list[int]], bool]) -> list[int]:
    """After tokens [S] at most n more, up to the first that `ends` says is the last. S + n is at most the context."""
    (model,) = inference.models
    model.eval()
    # Of a step's one position, sequence parallel ranks cannot each have a part: they compute all anew.
    cache = None if model.tp.sequence else Cache([len(tokens)])
    found: list[int] = []
    while len(found) < n and not (found and ends(found)):
        if cache is None:
            read, place = [*tokens, *found], len(tokens) + len(found) - 1
            read += [0] * (-len(read) % model.tp.size)
        else:
            read, place = found[-1:] or list(tokens), 0
        logits: Tensor = model(torch.tensor([read], device=inference.mesh.device), cache=cache)
        found.append(int(choice(logits[:, place].float(), model.cross_entropy.vocab, model.tp)[1]))
    return found
