"""Clipping by the global gradient norm, which hands out the norm of every parameter for the statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Scales all gradients in place so that their global norm is at most `max_norm` (0: leaves them).

    -> (global norm [], norms of the single gradients [P]), both before clipping; no host synchronization.
    """
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None, f"a parameter of shape {tuple(parameter.shape)} has no gradient"
        gradients.append(parameter.grad)
    norms = torch.stack(torch._foreach_norm(gradients))
    total = norms.norm()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / total).clamp(max=1.0))
    return total, norms
