"""Clipping by the global gradient norm, which hands out the norm of every parameter for the statistics."""

import torch
from torch import Tensor

from nlm.parallel.pieces import Pieces


def clip_gradients(pieces: Pieces, gradients: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales the pieces' reduced gradients in place so that their global norm is at most `max_norm` (0: leaves them).

    -> (global norm [], norms of the gradients of all parameters [P]), both before clipping; the same on every rank,
    and no host synchronization.
    """
    norms = pieces.norms(gradients)
    total = norms.norm()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / total).clamp(max=1.0).to(gradients[0].dtype))
    return total, norms
