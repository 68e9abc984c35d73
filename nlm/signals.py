"""What a recorded step shows of itself while it computes: sums and maxima over the elements of the tensors that pass
by, which add up over microbatches and ranks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

INSIDE = ("entropy", "saturated", "max_logit", "q_squares", "k_squares")
"""What attention shows of its heads; of what a rank has of them."""
MOMENTS = ("sum", "squares", "min", "max")
STREAM = (*(f"{of}_{name}" for of in ("branch", "stream") for name in MOMENTS), "product")
"""What every sublayer shows of its branch and of the stream it leaves, "product" that with the stream it was given."""
COLUMNS = (*INSIDE, *STREAM)


class View(NamedTuple):
    """What sublayers are asked to show: attention, of the queries of which `visible` [… Q S] says which keys they see.

    Positions count where these are true, all where they are None: `here` [B S/n] of this rank's part of the stream,
    `positions` [B S] of all of it, and `keys` [B T].
    """

    visible: Tensor
    here: Tensor | None = None
    positions: Tensor | None = None
    keys: Tensor | None = None


class Watch(NamedTuple):
    """And where they put it, vectors that make up a row each: Σ |a| of the F/n hidden units, COLUMNS."""

    view: View
    seen: list[Tensor]


class Signals:
    """Those of one step through L consecutive layers of P sublayers; the lists have an entry a microbatch.

    `queries`: attention shows so many of each sequence, evenly spread.
    """

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.units: list[Tensor] = []
        """[PL F/n]: Σ |a| of the hidden units, 0 for attention."""
        self.columns: list[Tensor] = []
        """[1+PL C]: the stream before the first layer, then the sublayers."""
        self.uniform: list[Mapping[str, Tensor]] = []
        """By kind of attention, [2]: the sum of the entropies that it would have if it were uniform, of one head, and
        of how many queries that is."""
        self.elements: float | Tensor = 0
        """How many count, over all microbatches."""
        self.gradients: dict[int, list[Tensor]] = {}
        """By layer, []: the sum of squares of the loss's gradient by the stream after it."""

    def begin(self, x: Tensor, n_layers: int, n_sublayers: int, view: View, uniform: Mapping[str, Tensor]) -> None:
        """A forward of the stream x through so many layers, of so many sublayers each. It lays out at once what it has
        seen in the end: small tensors that stay between large ones that go would leave memory in pieces."""
        self.view, self.n_sublayers, self.n_in_all = view, n_sublayers, n_sublayers * n_layers
        self.elements += x.numel() if view.here is None else view.here.sum() * x.shape[-1]
        columns = torch.zeros(1 + self.n_in_all, len(COLUMNS), dtype=_flat(x).dtype, device=x.device)
        columns[0, -len(MOMENTS) - 1 : -1] = moments(x, view.here)
        self.columns.append(columns)
        self.uniform.append(uniform)

    def add(self, place: int, rows: Tensor, x: Tensor, layer: int) -> None:
        """What the block at `place` in the part has seen [P F/n+C], and the stream x that leaves it."""
        n_units = rows.shape[1] - len(COLUMNS)
        if place == 0:
            self.units.append(rows.new_empty(self.n_in_all, n_units))
        here = slice(self.n_sublayers * place, self.n_sublayers * (place + 1))
        self.units[-1][here] = rows[:, :n_units]
        self.columns[-1][1:][here] = rows[:, n_units:]
        if x.requires_grad:
            x.register_hook(lambda gradient: self.gradients.setdefault(layer, []).append(squares(gradient)))

    def rms(self) -> Tensor:
        """Of one forward -> [L P 3]: of the stream before each sublayer, of what that gives, of the stream after it."""
        (columns,) = self.columns
        branch, stream = (columns[:, COLUMNS.index(name)] for name in ("branch_squares", "stream_squares"))
        squares = torch.stack([stream[:-1], branch[1:], stream[1:]], -1) / self.elements
        return squares.sqrt().view(-1, self.n_sublayers, 3)


def that_count(x: Tensor, positions: Tensor | None) -> Tensor:
    """[B S …], 0 where `positions` [B S] do not count, which adds nothing to a sum or to the largest |x|."""
    return x if positions is None else x.where(positions.view(*positions.shape, *(1,) * (x.dim() - 2)), 0)


def moments(x: Tensor, positions: Tensor | None) -> Tensor:
    """[B S D] -> MOMENTS of the elements that count [4], in float32 or more."""
    return torch.stack(_moments(_flat(that_count(x, positions))))


def stream_signals(x: Tensor, y: Tensor, positions: Tensor | None) -> Tensor:
    """The stream before a sublayer and after it -> MOMENTS of the second, and the product with the first [5]."""
    y = _flat(that_count(y, positions))
    return torch.stack([*_moments(y), y.dot(_flat(x))])


def squares(x: Tensor) -> Tensor:
    """[…] -> []: the sum of squares, in float32 or more."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.detach(), dtype=dtype).square()  # of any layout in memory, without a copy


def _moments(x: Tensor) -> list[Tensor]:
    return [x.sum(), x.dot(x), *x.aminmax()]


def _flat(x: Tensor) -> Tensor:
    x = x.detach().flatten()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
