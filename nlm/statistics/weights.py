"""Statistics of the parameters by role: norms of gradients, weights and updates, and what gains and scales are."""

from math import prod

import torch
from torch import Tensor

from nlm.anatomy import MATRICES, Role
from nlm.parallel.engine import Engine
from nlm.schemes.module import EquationModule

LEARNED = frozenset({Role.NORM, Role.SCALE})


class WeightStatistics:
    """One vector [L] a quantity and role, joined over the parameters of a role, such as biases and gains; and one for
    each gain and number that norms, scheme and score learn. NaN for layers that have none of it.

    Only the size of the update needs a copy of the weights, which lives from `before_update` to `vectors`.
    """

    def __init__(self, engine: Engine) -> None:
        self.pieces, self.n_layers = engine.pieces, engine.config.model.n_all_layers
        device = self.pieces.mesh.device
        parameters = self.pieces.weights.items()
        entries = [(i, w.role, w.site.number) for i, (_, w) in enumerate(parameters) if w.site]
        self.roles = sorted({role for _, role, _ in entries}, key=list(Role).index)
        self.indices = torch.tensor([i for i, _, _ in entries], device=device)
        cells = [layer * len(self.roles) + self.roles.index(role) for _, role, layer in entries]
        self.cells = torch.tensor(cells, device=device)
        self.has = torch.zeros(self.n_layers * len(self.roles), dtype=torch.bool, device=device)
        self.has[self.cells] = True

        rescale = {
            f"{name}.{part}": module.initial[f"{part}_rescale"]
            for name, module in engine.whole.named_modules()
            if isinstance(module, EquationModule)
            for part in module.rescaled
        }
        scale = [rescale.get(name, 1.0) / prod(weight.shape) for name, weight in parameters]
        self.scale = torch.tensor([*scale, torch.nan], dtype=torch.float64, device=device)
        """[P+1]: what makes of Σ |x| the mean of what the equation sees; the last is of what is not there."""
        self.learned: dict[str, Tensor] = {}
        """By name within a layer, [L]: which parameter it is."""
        for i, (name, weight) in enumerate(parameters):
            if weight.site and weight.role in LEARNED:
                part = name.partition("blocks.")[2].partition(".")[2]
                nowhere = torch.full((self.n_layers,), len(scale), device=device)
                self.learned.setdefault(part, nowhere)[weight.site.number] = i
        self.small = [i for i in self.pieces.counted if self.pieces.held[i].weight.role in LEARNED]
        self.before: list[Tensor] | None = None

    @torch.no_grad()
    def before_update(self) -> None:
        self.before = [stack.clone() for stack in self.pieces.stacks(self.pieces.tensors)]

    @torch.no_grad()
    def vectors(self, gradient_norms: Tensor) -> dict[str, Tensor]:
        """After the update, of the gradients' norms [P] -> "quantity/role", [L], the same on every rank."""
        assert self.before is not None, "before_update was not called in this step"
        pieces = self.pieces
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for then, now in zip(self.before, pieces.stacks(pieces.tensors), strict=True):
            for part, stack in zip(parts, (then, now, then - now), strict=True):
                part.append(pieces.square_sums(stack))
        self.before = None
        joint = pieces.mesh.sum(torch.stack([*map(pieces.joined, parts), self._sums()]))
        before, after, update = map(self.by_role, joint[:3])
        gradient = self.by_role(gradient_norms.square())

        # 1 - cos of the angle, without the difference of nearly equal numbers that W·W' would be taken from.
        far = (update.square() - (before - after).square()).clamp(min=0) / (2 * before * after)
        angle = 2 * (far / 2).clamp(max=1).sqrt().asin()
        there = before > 0  # what still is 0 has no direction, nor a size to compare with
        vectors = {"grad_norm/layer": self.by_layer(gradient_norms)}
        for quantity, values in (
            ("grad_norm", gradient),
            ("weight_norm", before),
            ("update_norm", update),
            ("update_ratio", torch.where(there, update / before, 0 * before)),
            ("weight_angle", torch.where(there, angle, 0 * before)),
        ):
            vectors |= self.named(quantity, values)
        sums = torch.cat([joint[3], joint.new_zeros(1)]) * self.scale
        return vectors | {f"learned/{part}": sums[which] for part, which in self.learned.items()}

    def _sums(self) -> Tensor:
        """[P]: Σ |x| of what this rank stands for of the gains and learned numbers."""
        sums = torch.zeros(len(self.pieces.weights), dtype=torch.float64, device=self.pieces.mesh.device)
        if self.small:
            norms = torch._foreach_norm([self.pieces.tensors[i] for i in self.small], 1)
            sums.index_add_(0, self.pieces.numbers[self.small], torch.stack(norms).to(sums))
        return sums

    def by_role(self, squares: Tensor) -> Tensor:
        """Squares [P] of the norms of single parameters -> norms [L R]."""
        return self._joined(squares).sqrt().where(self.has, torch.nan).view(self.n_layers, -1)

    def by_layer(self, norms: Tensor) -> Tensor:
        """Norms [P] of single parameters -> norms [L]."""
        return self._joined(norms.square()).view(self.n_layers, -1).sum(1).sqrt()

    def named(self, quantity: str, values: Tensor) -> dict[str, Tensor]:
        """[L R] -> "quantity/role", [L]."""
        return {f"{quantity}/{role}": column for role, column in zip(self.roles, values.T, strict=True)}

    def greatest(self, quantity: str, values: Tensor) -> dict[str, Tensor]:
        """[P] of matrices -> "quantity/role", [L]: the greatest where a layer has several of a role."""
        cells = values.new_full((self.n_layers * len(self.roles),), -torch.inf)
        cells.scatter_reduce_(0, self.cells, values[self.indices], "amax")
        named = self.named(quantity, cells.where(self.has, torch.nan).view(self.n_layers, -1))
        return {name: vector for name, vector in named.items() if name.rpartition("/")[2] in MATRICES}

    def _joined(self, squares: Tensor) -> Tensor:
        joined = torch.zeros(self.n_layers * len(self.roles), dtype=torch.float64, device=squares.device)
        return joined.index_add_(0, self.cells, squares[self.indices])
