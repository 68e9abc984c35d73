"""A function of whole matrices, of which the ranks hold pieces."""

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor

from nlm.parallel.pieces import BUCKET_ELEMENTS, Pieces, all_reduce


def apply_whole(
    function: Callable[[Tensor], Tensor], pieces: Pieces, names: Sequence[str], tensors: Sequence[Tensor]
) -> None:
    """In place: `function` [out in] -> [out in] of the matrices `names`, whose parts are among `tensors`, one a piece.

    Some matrices at a time are put together on all ranks that divide them, and each of these computes its share.
    """
    if not names:
        return
    mesh = pieces.mesh
    groups = [group for axis in ("dp_shard", "tp") if (group := mesh.group(axis))]  # type: ignore[arg-type]
    rank, ranks = mesh.rank("dp_shard") * mesh.tp.size + mesh.tp.rank, mesh.sizes["dp_shard"] * mesh.tp.size
    largest = max(prod(pieces.weights[name].shape) for name in names)
    at_a_time = max(ranks, BUCKET_ELEMENTS // largest)
    for start in range(0, len(names), at_a_time):
        matrices = {
            name: tensors[0].new_zeros(pieces.weights[name].shape, device=mesh.device)
            for name in names[start:][:at_a_time]
        }
        parts = [
            (t, h.part_of(matrices[h.name])) for h, t in zip(pieces.held, tensors, strict=True) if h.name in matrices
        ]
        for tensor, part in parts:
            part.copy_(tensor)
        for group in groups:
            all_reduce(list(matrices.values()), group)
        for i, matrix in enumerate(matrices.values()):
            if i % ranks == rank:
                matrix.copy_(function(matrix))
            else:
                matrix.zero_()
        for group in groups:
            all_reduce(list(matrices.values()), group)
        for tensor, part in parts:
            tensor.copy_(part)
