"""Continual backprop: the hidden units that are of least use are replaced by new ones, a few at a time (Dohare et al.
2024, "Loss of plasticity in deep continual learning", Nature 632, algorithm 1)."""

from collections.abc import Sequence
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nlm.anatomy import Span
from nlm.config import ContinualBackpropConfig
from nlm.model import FeedForward, Transformer
from nlm.optim.base import Optimizer
from nlm.random import WORD, hashed, mixed, normal

UNIT_AXES = {"w_up.weight": 0, "w_gate.weight": 0, "w_up.bias": 0, "w_gate.bias": 0, "w_down.weight": 1}
"""Of a feed-forward sublayer, the parameters that each hidden unit has a slice of, and along which axis units lie."""


class Activity(nn.Module):
    """What a feed-forward sublayer observes in a step: the sum of |a| of each hidden unit, and of how many tokens."""

    def __init__(self, n_units: int, like: Tensor) -> None:
        super().__init__()
        self.total: Tensor
        self.count: Tensor
        self.register_buffer("total", torch.zeros(n_units, dtype=like.dtype, device=like.device), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device=like.device), persistent=False)

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> None:
        """[B S F]; once more in recomputation, by which the mean stays what it is."""
        self.total += hidden.abs().sum((0, 1), dtype=self.total.dtype)
        self.count += hidden.shape[0] * hidden.shape[1]


class Incoming(NamedTuple):
    """A piece of a matrix whose rows are units: its tensors that get a new unit's weights, and where it lies."""

    tensors: list[Tensor]
    ffn: int
    rows: Span
    columns: Span
    key: int
    parameter: int


class ContinualBackprop:
    """Of each hidden unit i, where |a_i| is the mean over the batch of what `w_down` reads of it:

        u ← η u + (1 − η) · |a_i| · mean |w_down[:, i]|, û = u / (1 − η^age)

    In every sublayer, of the units older than `maturity` updates the share `replacement_rate` is replaced at each
    update, whole units as fractions add up, those of the lowest û. A new unit reads by normal weights of the RMS that
    its matrix began with, writes by zeros, has no bias, and all that the optimizer keeps of each of its weights is as
    at the start.

    `utility`, `age` [N F] and `owed` [N 1], the fractions, are of all N sublayers and the same on every rank. Random
    numbers depend on the seed, the matrix, the unit and the update. It runs on the device, without a wait for it.
    """

    def __init__(
        self,
        config: ContinualBackpropConfig,
        optimizer: Optimizer,
        models: Sequence[Transformer],
        whole: Transformer,
        seed: int,
    ) -> None:
        self.config, self.pieces, self.dim = config, optimizer.pieces, whole.config.dim
        pieces, device = self.pieces, self.pieces.mesh.device
        self.names = [name for name, module in whole.named_modules() if isinstance(module, FeedForward)]
        numbers = {name: i for i, name in enumerate(self.names)}
        shape = len(self.names), whole.config.ffn_dim
        self.at_once = ceil(config.replacement_rate * whole.config.ffn_dim)
        """The most units of a sublayer that one update can replace."""
        self.utility, self.age = torch.zeros(2, *shape, dtype=torch.float64, device=device)
        self.owed = torch.zeros(len(self.names), 1, dtype=torch.float64, device=device)
        self.replaced = torch.zeros(shape, dtype=torch.bool, device=device)
        self.sums = torch.zeros(3, *shape, dtype=torch.float64, device=device)
        """[3 N F]: of |a|, of tokens, of |w_down|."""

        self.activities: list[tuple[Activity, Tensor]] = []
        for model in models:
            for name, module in model.named_modules():
                if isinstance(module, FeedForward):
                    (units, _), like = module.w_up.spans["weight"], module.w_up.weight
                    module.observe = Activity(len(units), like)
                    place = self.sums[:2, numbers[name], units.start : units.stop]
                    self.activities.append((module.observe, place))

        owners = {f"{name}.{of}": (i, axis) for name, i in numbers.items() for of, axis in UNIT_AXES.items()}
        order = {name: i for i, name in enumerate(pieces.weights)}
        self.slices: list[tuple[Tensor, Tensor]] = []
        """What units have slices of, with the part of `replaced` that broadcasts against it."""
        self.outgoing: list[tuple[Tensor, Tensor]] = []
        self.incoming: list[Incoming] = []
        for k, (h, state) in enumerate(zip(pieces.held, optimizer.state, strict=True)):
            if h.name not in owners or not h.tensor.numel():
                continue
            ffn, axis = owners[h.name]
            units = h.spans[axis]
            replaced = self.replaced[ffn, units.start : units.stop]
            mask = replaced if h.tensor.dim() == 1 else replaced.unsqueeze(1 - axis)
            self.slices += [(tensor, mask) for tensor in (h.tensor, *state.values())]
            if axis == 1 and k in pieces.counted:
                self.outgoing.append((h.tensor, self.sums[2, ffn, units.start : units.stop]))
            elif axis == 0 and h.tensor.dim() == 2:
                tensors = [h.tensor, *(state[name] for name in optimizer.copies)]
                key = hashed(f"{seed}:{h.name}") & WORD
                self.incoming.append(Incoming(tensors, ffn, units, h.spans[1], key, order[h.name]))

        def each(values: list[int]) -> Tensor:
            """[M 1], of the M incoming pieces."""
            return torch.tensor(values, dtype=torch.int64, device=device)[:, None]

        roots = [prod(weight.shape) ** 0.5 for weight in pieces.weights.values()]
        rms = pieces.norms(pieces.tensors) / torch.tensor(roots, dtype=torch.float64, device=device)
        self.rms = rms[each([piece.parameter for piece in self.incoming])]
        self.ffn = each([piece.ffn for piece in self.incoming])[:, 0]
        self.keys = each([piece.key for piece in self.incoming])
        self.first = each([piece.rows.start for piece in self.incoming])
        self.n_rows = each([len(piece.rows) for piece in self.incoming])

    @property
    def shared(self) -> dict[str, Tensor]:
        fields = {"utility": self.utility, "age": self.age, "owed": self.owed}
        return {f"{name}.{field}": of[i] for field, of in fields.items() for i, name in enumerate(self.names)}

    def begin(self) -> None:
        """Before a step."""
        for activity, _ in self.activities:
            activity.total.zero_()
            activity.count.zero_()

    @torch.no_grad()
    def update(self, update: Tensor, left_out: Tensor | None) -> None:
        """After update number `update` [] of the weights; nothing changes where `left_out` [] is true."""
        takes_part = torch.ones_like(update, dtype=torch.bool) if left_out is None else ~left_out
        rate, decay = self.config.replacement_rate, self.config.decay
        self.utility.lerp_(self._use().where(takes_part, self.utility), 1 - decay)
        self.age += takes_part
        eligible = (self.age > self.config.maturity) & takes_part
        self.owed += rate * eligible.double().sum(1, keepdim=True)
        n = self.owed.floor()
        self.owed -= n

        # Those that do nothing at all are equal: stable, so that the first of equals go first on every device.
        estimate = (self.utility / (1 - decay**self.age)).masked_fill(~eligible, torch.inf)
        units = estimate.sort(dim=1, stable=True).indices[:, : self.at_once]  # [N K]
        chosen = torch.arange(self.at_once, device=n.device) < n
        self.replaced.zero_().scatter_(1, units, chosen)
        for tensor in (self.utility, self.age):
            tensor.masked_fill_(self.replaced, 0)
        for tensor, mask in self.slices:
            tensor.masked_fill_(mask.to(tensor.device), 0)
        self._draw(units[self.ffn], chosen[self.ffn], update.long())

    def _use(self) -> Tensor:
        """[N F]: of how much use the units were in this step."""
        self.sums.zero_()
        for activity, place in self.activities:
            place[0], place[1] = activity.total, activity.count
        for tensor, place in self.outgoing:
            place += tensor.abs().sum(0).to(place)
        total, count, outgoing = self.pieces.mesh.sum(self.sums)
        return total / count.clamp(min=1) * outgoing / self.dim

    def _draw(self, units: Tensor, chosen: Tensor, update: Tensor) -> None:
        """The rows of the `chosen` among `units` [M K] of the incoming pieces, which are zero."""
        keys = mixed(mixed(self.keys + mixed(update)) + mixed(units))
        rows = normal(keys[..., None], torch.arange(self.dim, device=units.device)) * self.rms[..., None]  # [M K D]
        local = units - self.first
        rows *= (chosen & (local >= 0) & (local < self.n_rows))[..., None]
        places = local.clamp(min=0).minimum(self.n_rows - 1)
        for piece, place, new in zip(self.incoming, places, rows, strict=True):
            for tensor in piece.tensors:
                tensor.index_add_(
                    0, place.to(tensor.device), new[:, piece.columns.start : piece.columns.stop].to(tensor)
                )
