"""Running statistics of the norms that have them: joined over microbatches and ranks after each step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nlm.model import Transformer
from nlm.norms.batch import BatchStatistics
from nlm.parallel.pieces import Pieces


class RunningStatistics:
    """The state of every such norm of the model side by side, [N] each, the same on all ranks.

    `whole` is the model that the ranks have the parts `models` of. `shared`, which is to be saved, has the state under
    the names of the norms' buffers.
    """

    def __init__(self, pieces: Pieces, models: Sequence[Transformer], whole: Transformer, batch_tokens: int) -> None:
        self.pieces, self.batch_tokens = pieces, batch_tokens
        self.norms = {name: norm for model in models for name, norm in _norms(model)}
        self.kind: BatchStatistics | None = None
        self.places: dict[str, slice] = {}
        self.n = 0
        for name, norm in _norms(whole):
            self.kind, start, self.n = norm, self.n, self.n + norm.width.full  # all are of one kind
            self.places[name] = slice(start, self.n)
        self.fields = self.kind.state if self.kind else ()
        self.state = dict(zip(self.fields, self._mean(len(self.fields), _state), strict=True))
        self.pull = torch.zeros(self.n, dtype=torch.float64, device=pieces.mesh.device)
        owners = {f"{name}.weight": place for name, place in self.places.items()}
        published = self.kind is not None and self.kind.published
        self.gains = [i for i in pieces.counted if published and pieces.held[i].name in owners]
        self.pulls = [pieces.held[i].part_of(self.pull[owners[pieces.held[i].name]]) for i in self.gains]

    @property
    def shared(self) -> dict[str, Tensor]:
        return {
            f"{name}.{field}": self.state[field][place] for field in self.fields for name, place in self.places.items()
        }

    def begin(self) -> None:
        """Before a step."""
        for norm in self.norms.values():
            norm.observed.zero_()
            norm.count.zero_()

    def look(self, gradients: Sequence[Tensor]) -> None:
        """At gradients that are reduced, but not yet clipped: the gain times its own is Σ z times the gradient by z."""
        if not self.gains:
            return
        self.pull.zero_()
        for i, pull in zip(self.gains, self.pulls, strict=True):
            pull.copy_(self.pieces.tensors[i] * gradients[i] / self.batch_tokens)
        self.pieces.mesh.sum(self.pull)

    @torch.no_grad()
    def update(self, update: Tensor, left_out: Tensor | None) -> None:
        """After update number `update` [] of the weights."""
        if self.kind is None:
            return
        means = self._mean(len(self.kind.observed), lambda norm: (norm.observed, norm.count))
        now = {field: joint.clone() for field, joint in self.state.items()}  # a window moves on within itself
        after = self.kind.advance(now, means, self.pull, update)
        for field, before in self.state.items():
            before.copy_(after[field] if left_out is None else after[field].where(~left_out, before))
        self.place(update)

    @torch.no_grad()
    def place(self, updates: Tensor) -> None:
        """What the norms compute with, from the state after so many updates."""
        for name, norm in self.norms.items():
            for field in self.fields:
                getattr(norm, field).copy_(self.state[field][self.places[name]][norm.width.start : norm.width.stop])
            norm.updates.copy_(updates)

    def _mean(self, k: int, of: Callable[[BatchStatistics], tuple[Tensor, Tensor]]) -> Tensor:
        """Sums [k D] and weights [] of the ranks' norms -> [k N], the sums over the weights."""
        sums = torch.zeros(k + 1, self.n, dtype=torch.float64, device=self.pieces.mesh.device)
        for name, norm in self.norms.items():
            mine = sums[:, self.places[name]][:, norm.width.start : norm.width.stop]
            mine[:-1], mine[-1] = of(norm)
        *totals, weights = self.pieces.mesh.sum(sums) if self.n else sums
        return torch.stack(totals) / weights.clamp(min=1) if totals else sums[:0]


def _norms(model: Transformer) -> list[tuple[str, BatchStatistics]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BatchStatistics)]


def _state(norm: BatchStatistics) -> tuple[Tensor, Tensor]:
    return torch.stack([getattr(norm, field) for field in norm.state]), torch.ones(())
