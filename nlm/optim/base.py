"""What all optimizers have in common: their state, and that a step can be left out without waiting for the device."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from nlm.config import OptimConfig
from nlm.optim.agc import adaptive_clipping
from nlm.optim.centralize import centralization
from nlm.optim.slices import Slices
from nlm.parallel.pieces import Pieces

Tensors = list[Tensor] | tuple[Tensor, ...]
"""One a piece."""
Number = float | Tensor


class Optimizer(ABC):
    """Updates the pieces by their gradients, whose memory it uses up.

    `state` has a tensor of the piece's own shape for each name; `shared`, under NAME.field, what is of whole parameters
    and the same on every rank. Both are saved. State begins at zero, but for the `copies` of the weights.
    """

    copies: tuple[str, ...] = ()
    fused = False  # whether an update is one kernel
    already_unit: frozenset[int] = frozenset()
    """Numbers of the pieces that an update itself projects."""

    def __init__(self, pieces: Pieces, config: OptimConfig) -> None:
        self.pieces, self.weights = pieces, pieces.tensors
        self.state: list[dict[str, Tensor]] = [{} for _ in pieces.held]
        self.shared: dict[str, Tensor] = {}
        groups = [pieces.scheme.group(h.weight) for h in pieces.held]
        self.lr_multipliers = [group.lr for group in groups]
        self.weight_decays = [config.weight_decay * group.weight_decay for group in groups]
        self.updates = torch.zeros((), dtype=torch.float64, device=self.weights[0].device)
        self.left_out = torch.zeros((), dtype=torch.bool, device=self.updates.device)
        self._process = [adaptive_clipping(pieces, config.agc)] if config.agc else []
        self._process += [centralization(pieces)] if config.centralize else []

    def keep(self, name: str, chosen: Iterable[int] | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """State of all pieces, or of the chosen ones, zero as yet, of the weights' dtype unless told otherwise."""
        tensors = []
        for i in range(len(self.weights)) if chosen is None else chosen:
            self.state[i][name] = torch.zeros_like(self.weights[i], dtype=dtype)
            tensors.append(self.state[i][name])
        return tensors

    def share(self, name: str, slices: Slices) -> Tensor:
        """State of all slices [N], zero as yet."""
        joint = torch.zeros(slices.n, dtype=torch.float64, device=self.pieces.mesh.device)
        self.shared |= {f"{of}.{name}": part for of, part in slices.by_parameter(joint).items()}
        return joint

    @torch.no_grad()
    def step(self, lr: float, left_out: Tensor | None = None) -> None:
        """An update at the learning rate `lr`; where `left_out` [] bool is true nothing changes, not even the count."""
        gradients = self.pieces.gradients()
        for process in self._process:
            process(gradients)
        self.left_out = torch.zeros_like(self.left_out) if left_out is None else left_out.to(self.left_out.device)
        self.updates += ~self.left_out
        self.update(lr, gradients)

    @abstractmethod
    def update(self, lr: float, gradients: Tensors) -> None:
        """One update of the weights, the `updates`-th."""

    def start_after(self, updates: int) -> None:
        self.updates.fill_(updates)


class Descent(Optimizer):
    """w ← w − lr · u along a direction u.

    A step is left out by two doors: its gradients are zero where they enter the state, its directions where they leave
    for the weights. What is not finite passes neither.
    """

    @abstractmethod
    def direct(self, gradients: Tensors) -> None:
        """In place: the gradients become the directions."""

    def update(self, lr: float, gradients: Tensors) -> None:
        self._shut(gradients)
        self.direct(gradients)
        self._shut(gradients)
        torch._foreach_mul_(gradients, [lr * multiplier for multiplier in self.lr_multipliers])
        torch._foreach_sub_(self.weights, gradients)

    def _shut(self, tensors: Tensors) -> None:
        for tensor in tensors:
            tensor.masked_fill_(self.left_out, 0)

    @property
    def t(self) -> Tensor:
        """[]: the number of this update, from 1, also where a run's first is left out."""
        return self.updates.clamp(min=1)

    def add(
        self, states: Tensors, values: Tensors, keep: Number, take: Number, when: Tensor | Literal[True] = True
    ) -> None:
        """s ← keep · s + take · v, in place, when `when` [] bool is true."""
        if states:
            takes_part = (~self.left_out & when).double()
            torch._foreach_mul_(states, (1 - takes_part * (1 - keep)).to(states[0]))
            torch._foreach_add_(states, torch._foreach_mul(values, (takes_part * take).to(states[0])))

    def average(self, states: Tensors, values: Tensors, beta: Number, when: Tensor | Literal[True] = True) -> None:
        """s ← β s + (1 − β) v, in place, when `when` [] bool is true."""
        self.add(states, values, beta, 1 - beta, when)

    def decay(self, directions: Tensors, factors: Tensors | None = None) -> None:
        """u ← u + λ w, in place; `factors` [] multiply λ."""
        decays = torch._foreach_mul(self.weights, self.weight_decays)
        if factors is not None:
            torch._foreach_mul_(decays, factors)
        torch._foreach_add_(directions, decays)
