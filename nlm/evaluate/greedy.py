"""The most likely continuation, by a forward of everything for each token."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nlm.evaluate.predictions import choice
from nlm.parallel.engine import Inference


@torch.no_grad()
def greedy(inference: Inference, tokens: Sequence[int], n: int, ends: Callable[[list[int]], bool]) -> list[int]:
    """After tokens [S] at most n more, up to the first that `ends` says is the last. S + n is at most the context."""
    (model,) = inference.models
    multiple = model.tp.size if model.tp.sequence else 1
    model.eval()
    found: list[int] = []
    while len(found) < n and not (found and ends(found)):
        so_far = [*tokens, *found]
        rows = np.array([so_far + [0] * (-len(so_far) % multiple)])
        logits: Tensor = model(torch.from_numpy(rows).to(inference.mesh.device))
        found.append(int(choice(logits[:, len(so_far) - 1].float(), model.cross_entropy.vocab, model.tp)[1]))
    return found
