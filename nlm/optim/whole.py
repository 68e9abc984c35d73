"""Functions of whole matrices, of which the ranks hold pieces."""

from collections.abc import Callable, Iterator, Sequence
from math import prod

from torch import Tensor

from nlm.parallel.pieces import BUCKET_ELEMENTS, Pieces, all_reduce


class Gathered:
    """Some matrices, whole, by name: the same on all ranks that divide them, of which this one is to compute `mine`."""

    def __init__(self, pieces: Pieces, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        mesh = pieces.mesh
        self._groups = [group for axis in ("dp_shard", "tp") if (group := mesh.group(axis))]  # type: ignore[arg-type]
        self.matrices = {name: tensors[0].new_zeros(pieces.weights[name].shape, device=mesh.device) for name in names}
        self._parts = [
            (t, h.part_of(self.matrices[h.name]))
            for h, t in zip(pieces.held, tensors, strict=True)
            if h.name in self.matrices
        ]
        for tensor, part in self._parts:
            part.copy_(tensor)
        self._join()
        self.mine = list(names)[mesh.rank("dp_shard") * mesh.tp.size + mesh.tp.rank :: ranks_of(pieces)]

    def give_back(self) -> None:
        """What each rank made of its own matrices, to the pieces that all hold of them."""
        for name in self.matrices.keys() - set(self.mine):
            self.matrices[name].zero_()
        self._join()
        for tensor, part in self._parts:
            tensor.copy_(part)

    def _join(self) -> None:
        for group in self._groups:
            all_reduce(list(self.matrices.values()), group)


def ranks_of(pieces: Pieces) -> int:
    """How many ranks divide a matrix."""
    return pieces.mesh.sizes["dp_shard"] * pieces.mesh.tp.size


def gathered(pieces: Pieces, names: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[Gathered]:
    """The matrices `names`, whose parts are among `tensors`, one a piece, some at a time."""
    if names:
        largest = max(prod(pieces.weights[name].shape) for name in names)
        at_a_time = max(ranks_of(pieces), BUCKET_ELEMENTS // largest)
        for start in range(0, len(names), at_a_time):
            yield Gathered(pieces, names[start:][:at_a_time], tensors)


def apply_whole(
    function: Callable[[Tensor], Tensor], pieces: Pieces, names: Sequence[str], tensors: Sequence[Tensor]
) -> None:
    """In place: `function` [out in] -> [out in] of the matrices `names`, whose parts are among `tensors`, one a piece.

    Each of the ranks that divide a matrix computes its share of them.
    """
    for some in gathered(pieces, names, tensors):
        for name in some.mine:
            some.matrices[name].copy_(function(some.matrices[name]))
        some.give_back()
