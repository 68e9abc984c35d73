"""Adaptive gradient clipping: no row's gradient is larger than a fraction of the row (Brock et al. 2021,
arXiv:2102.06171, eq. 3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from nlm.anatomy import Role
from nlm.optim.slices import Slices, products
from nlm.parallel.pieces import Pieces

LEAST_NORM = 1e-3
"""What counts as the norm of a smaller row, so that what starts at zero can move."""


def adaptive_clipping(pieces: Pieces, factor: float) -> Callable[[list[Tensor]], None]:
    """G ← G · min(1, factor · max(‖W‖, LEAST_NORM) / ‖G‖) for every row, in place; a vector is one row.

    The head is left alone, as the paper leaves the last layer; a tied table is an embedding. Before an optimizer that
    divides by the gradient's size, only what changes from step to step is left of it.
    """
    rows = Slices(pieces, over=1)
    head = pieces.which(lambda weight: weight.role == Role.HEAD)[rows.owner]

    def clip(gradients: list[Tensor]) -> None:
        weights = pieces.tensors
        weight, gradient = rows.sums(products(weights, weights), products(gradients, gradients)).sqrt()
        scale = (factor * weight.clamp(min=LEAST_NORM) / gradient).clamp(max=1)
        torch._foreach_mul_(gradients, rows.spread(scale.where(~head, 1)))

    return clip
