"""AdamW over the groups that the scheme's rule makes of the weights (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from pydantic import PositiveFloat
from torch import Tensor

from nlm.anatomy import Group, Weight
from nlm.config import Betas, OptimConfig
from nlm.optim.base import Optimizer, Tensors
from nlm.parallel.pieces import Pieces
from nlm.schemes.base import Scheme


class AdamW(Optimizer):
    """Torch's own, in one kernel."""

    fused = True

    def __init__(
        self, pieces: Pieces, config: OptimConfig, *, betas: Betas = (0.9, 0.95), eps: PositiveFloat = 1e-8
    ) -> None:
        super().__init__(pieces, config)
        parameters = ((h.tensor, h.weight) for h in pieces.held)
        self.adamw = adamw(parameters, pieces.scheme, config, betas, eps)
        self.keep("exp_avg")
        self.keep("exp_avg_sq")
        for tensor, state in zip(self.weights, self.state, strict=True):
            self.adamw.state[tensor] = {"step": torch.zeros((), device=tensor.device)} | state

    def update(self, lr: float, gradients: Tensors) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        for tensor, gradient in zip(self.weights, gradients, strict=True):
            tensor.grad = gradient
        # The kernel reads it on the device, as it does for gradient scaling: neither weights nor state change.
        self.adamw.found_inf = self.left_out.float()  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad()

    def start_after(self, updates: int) -> None:
        super().start_after(updates)
        for state in self.adamw.state.values():
            state["step"].fill_(updates)


def adamw(
    parameters: Iterable[tuple[Tensor, Weight]],
    scheme: Scheme,
    config: OptimConfig,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """One parameter group for each Group; `lr_multiplier` in a group scales the scheduled learning rate."""
    groups: dict[Group, list[Tensor]] = defaultdict(list)
    for parameter, weight in parameters:
        groups[scheme.group(weight)].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": tensors,
                "lr_multiplier": group.lr,
                "weight_decay": config.weight_decay * group.weight_decay,
            }
            for group, tensors in groups.items()
        ],
        lr=config.lr,
        betas=betas,
        eps=eps,
        fused=True,
    )
