"""Projection of weights to unit norm after a step, for the schemes that ask for it."""

from collections.abc import Callable, Container

import torch
import torch.distributed as dist
from torch import Tensor

from nlm.init import to_unit
from nlm.model import Held
from nlm.parallel.pieces import Pieces


def whole_axis(pieces: Pieces, h: Held) -> int | None:
    """Along which axis slices of a piece get norm 1, if this rank has the whole of each."""
    axis = pieces.scheme.unit_axis(h.weight)
    return axis if axis is not None and h.spans[axis].is_whole else None


def projection(pieces: Pieces, done: Container[int] = ()) -> Callable[[Tensor | None], None]:
    """The function to call after each optimizer step; it does nothing for a scheme that projects nothing, nor to the
    pieces that the step has `done`, and changes nothing where the step was left out (`left_out`, [] bool).

    Where data parallel ranks hold parts of the very slices that get norm 1, they join the squares of all of them.
    """
    whole: list[tuple[Tensor, int]] = []
    cut: list[tuple[Tensor, int, slice]] = []
    first, n_slices = {}, 0  # of each matrix in the joint vector, the same on all ranks
    for name, weight in pieces.weights.items():
        if (axis := pieces.scheme.unit_axis(weight)) is not None:
            first[name], n_slices = n_slices, n_slices + weight.shape[1 - axis]
    for i, h in enumerate(pieces.held):
        if (axis := pieces.scheme.unit_axis(h.weight)) is not None and i not in done:
            here, other = first[h.name], h.spans[1 - axis]
            if whole_axis(pieces, h) is not None:
                whole.append((h.tensor, axis))
            else:
                cut.append((h.tensor, axis, slice(here + other.start, here + other.stop)))
    group = pieces.mesh.group("dp_shard")

    @torch.no_grad()
    def project(left_out: Tensor | None = None) -> None:
        for matrix, axis in whole:
            to_unit(matrix, axis, left_out)
        if group is not None and n_slices:
            squares = torch.zeros(n_slices, dtype=pieces.tensors[0].dtype, device=pieces.mesh.device)
            for matrix, axis, place in cut:
                squares[place] += matrix.square().sum(axis)
            dist.all_reduce(squares, group=group)
            norms = squares.sqrt() if left_out is None else squares.sqrt().where(~left_out, 1)
            for matrix, axis, place in cut:
                matrix.div_(norms[place].unsqueeze(axis))

    return project
