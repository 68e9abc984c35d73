"""What a recorded step shows of itself while it computes: sums and maxima over the elements of the tensors that pass
by, which add up over microbatches and ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INSIDE = ("entropy", "saturated", "max_logit", "q_squares", "k_squares")
"""What attention shows of its heads; of what a rank has of them."""
MOMENTS = ("sum", "squares", "min", "max")
STREAM = (*(f"{of}_{name}" for of in ("branch", "stream") for name in MOMENTS), "product")
"""What every sublayer shows of its branch and of the stream it leaves, "product" that with the stream it was given."""
COLUMNS = (*INSIDE, *STREAM)


class Watch(NamedTuple):
    """What the sublayers of a block are asked to show: attention, of the queries of which `visible` [… Q S] says which
    keys they see; and where they put it."""

    visible: Tensor
    seen: list[Tensor]


class Signals:
    """Those of one step through L consecutive layers of two sublayers; the lists have an entry a microbatch.

    `queries`: attention shows so many of each sequence, evenly spread.
    """

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.rows: list[Tensor] = []
        """[1+2L C] of COLUMNS: the stream before the first layer, then the sublayers."""
        self.activity: list[Tensor] = []
        """[N F/n]: Σ |a| of the hidden units of the N feed-forward sublayers."""
        self.uniform: list[Tensor] = []
        """[]: the sum of the entropies that attention would have if it were uniform, of one head."""
        self.gradients: dict[int, list[Tensor]] = {}
        """By layer, []: the sum of squares of the loss's gradient by the stream after it."""

    def add(self, first: Tensor, seen: Sequence[Tensor], uniform: Tensor) -> None:
        """What one forward has seen: the stream before the first layer, and of every sublayer its columns, [] each,
        and the activity of its hidden units where it has them."""
        self.elements = first.numel()
        nothing = torch.zeros((), device=first.device)
        before = [nothing] * COLUMNS.index("stream_sum") + [*moments(first), nothing]
        self.rows.append(torch.stack([*before, *(x for x in seen if not x.dim())]).view(-1, len(COLUMNS)))
        if activity := [x for x in seen if x.dim()]:
            self.activity.append(torch.stack(activity))
        self.uniform.append(uniform)

    def follow(self, x: Tensor, layer: int) -> None:
        """Looks at the gradient of the stream after a layer when it comes."""
        if x.requires_grad:
            x.register_hook(lambda gradient: self.gradients.setdefault(layer, []).append(squares(gradient)))

    def rms(self) -> Tensor:
        """Of one forward -> [L 2 3]: of the stream before each sublayer, of what that gives, of the stream after it."""
        (rows,) = self.rows
        branch, stream = (rows[:, COLUMNS.index(name)] for name in ("branch_squares", "stream_squares"))
        squares = torch.stack([stream[:-1], branch[1:], stream[1:]], -1) / self.elements
        return squares.sqrt().view(-1, 2, 3)


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[…] -> MOMENTS of its elements, [] each, in float32 or more."""
    x = _flat(x)
    return x.sum(), x.dot(x), *x.aminmax()


@torch.no_grad()
def squares(x: Tensor) -> Tensor:
    """[…] -> []: the sum of squares, in float32 or more."""
    x = _flat(x)
    return x.dot(x)


@torch.no_grad()
def product(x: Tensor, y: Tensor) -> Tensor:
    """[…], […] -> []: the sum of products, in float32 or more."""
    return _flat(x).dot(_flat(y))


def _flat(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).flatten()
