"""Sums over whole rows or columns of the parameters, of which each rank may hold but pieces."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from nlm.anatomy import Span
from nlm.parallel.pieces import Pieces


class Slices:
    """The rows of all parameters, one after another in vectors [N], or their columns; a vector is one row.

    `over` is the dim along which a slice runs: 1 for rows, 0 for columns. What is summed is the same on every rank.
    """

    def __init__(self, pieces: Pieces, over: Literal[0, 1]) -> None:
        self.pieces, self.over = pieces, over
        device = pieces.mesh.device
        shapes = [(1, *weight.shape)[-2:] for weight in pieces.weights.values()]
        self.counts = [shape[1 - over] for shape in shapes]
        self.n, self._counts = sum(self.counts), torch.tensor(self.counts, device=device)
        self.lengths = torch.tensor([shape[over] for shape in shapes], device=device)
        """[P]: how many elements a slice has."""
        self.sizes = self.lengths * self._counts
        """[P]: how many elements a parameter has."""
        self.owner = (
            torch.arange(len(shapes)).repeat_interleave(torch.tensor(self.counts), output_size=self.n).to(device)
        )
        """[N]: the number of the parameter that a slice is of."""
        starts = dict(zip(pieces.weights, accumulate(self.counts, initial=0), strict=False))
        places = []
        for h in pieces.held:
            span = (Span.whole(1), *h.spans)[-2:][1 - over]
            places.append(torch.arange(span.start, span.stop) + starts[h.name])
        self._sizes = [len(place) for place in places]
        self._places = torch.cat(places).to(device)
        self._counted = torch.cat([places[i] for i in pieces.counted] or [torch.arange(0)]).to(device)

    def sums(self, *values: Iterable[Tensor]) -> Tensor:
        """k times tensors, one a piece -> [k N], in float64, by one collective."""
        joint = torch.zeros(len(values), self.n, dtype=torch.float64, device=self.pieces.mesh.device)
        counted = set(self.pieces.counted)
        for sums, tensors in zip(joint, values, strict=True):
            parts = [
                torch.atleast_2d(t).sum(self.over, dtype=torch.float64) for i, t in enumerate(tensors) if i in counted
            ]
            if parts:
                sums.index_add_(0, self._counted, torch.cat(parts).to(joint))
        return self.pieces.mesh.sum(joint)

    def spread(self, joint: Tensor) -> list[Tensor]:
        """[N] -> one tensor a piece, that broadcasts against it and is of its kind."""
        parts = joint[self._places].to(self.pieces.tensors[0]).split(self._sizes)
        return [
            part.unsqueeze(self.over) if t.dim() == 2 else part
            for part, t in zip(parts, self.pieces.tensors, strict=True)
        ]

    def total(self, joint: Tensor) -> Tensor:
        """[… N] -> [… P]: the sum over all slices of a parameter."""
        return self._reduce(joint, "sum")

    def greatest(self, joint: Tensor) -> Tensor:
        """[N] -> [P]."""
        return self._reduce(joint, "max")

    def _reduce(self, joint: Tensor, how: str) -> Tensor:
        """In an order that is the same on every rank, as that of `index_add_` on a GPU is not."""
        return torch.segment_reduce(joint.movedim(-1, 0), how, lengths=self._counts, unsafe=True).movedim(0, -1)

    def by_parameter(self, joint: Tensor) -> dict[str, Tensor]:
        """[N] -> under the parameter's name, a view of its slices."""
        return dict(zip(self.pieces.weights, joint.split(self.counts), strict=True))


def products(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> Iterator[Tensor]:
    """In float64: squares of small gradients leave float32's range."""
    return (x.double() * y for x, y in zip(xs, ys, strict=True))
