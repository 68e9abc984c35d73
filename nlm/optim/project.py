"""Projection of weights to unit norm after a step, for the schemes that ask for it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nlm.init import to_unit
from nlm.parallel.pieces import Pieces


def projection(pieces: Pieces) -> Callable[[], None]:
    """The function to call after each optimizer step; it does nothing for a scheme that projects nothing."""
    whole: list[tuple[Tensor, int]] = []
    cut: list[tuple[Tensor, int]] = []
    for h in pieces.held:
        if (axis := pieces.scheme.unit_axis(h.weight)) is not None:
            (whole if h.spans[axis].is_whole else cut).append((h.tensor, axis))
    lengths = [tensor.shape[1 - axis] for tensor, axis in cut]
    group = pieces.mesh.group("dp_shard")

    @torch.no_grad()
    def project() -> None:
        for matrix, axis in whole:
            to_unit(matrix, axis)
        if cut:  # by FSDP2, along the axis of the norm
            squares = torch.cat([matrix.square().sum(axis) for matrix, axis in cut])
            dist.all_reduce(squares, group=group)
            for (matrix, axis), norm in zip(cut, squares.sqrt().split(lengths), strict=True):
                matrix.div_(norm.unsqueeze(axis))

    return project
