"""Gradient centralization: the gradient of every row of a matrix has mean 0 (Yong et al. 2020, arXiv:2004.01461,
eq. 1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from nlm.anatomy import MATRICES
from nlm.optim.slices import Slices
from nlm.parallel.pieces import Pieces


def centralization(pieces: Pieces) -> Callable[[list[Tensor]], None]:
    """G ← G − mean(G) over the inputs of each output, in place; vectors stay as they are."""
    rows = Slices(pieces, over=1)
    matrices = pieces.which(lambda weight: weight.role in MATRICES)
    factors = (matrices.double() / rows.lengths)[rows.owner]

    def centralize(gradients: list[Tensor]) -> None:
        torch._foreach_sub_(gradients, rows.spread(rows.sums(gradients)[0] * factors))

    return centralize
