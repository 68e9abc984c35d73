"""AdamW and the projection of its weights in one pass over memory, in nlm's own kernel."""

import torch
from pydantic import PositiveFloat

from nlm.config import Betas, OptimConfig
from nlm.kernels.adamw import table, update
from nlm.kernels.check import check_adamw
from nlm.optim.base import Optimizer, Tensors
from nlm.optim.project import whole_axis
from nlm.parallel.pieces import Pieces


class TritonAdamW(Optimizer):
    """The equation and the state of AdamW. Errors: RuntimeError where the kernel is wrong on shapes of the pieces."""

    fused = True

    def __init__(
        self, pieces: Pieces, config: OptimConfig, *, betas: Betas = (0.9, 0.95), eps: PositiveFloat = 1e-8
    ) -> None:
        super().__init__(pieces, config)
        self.betas, self.eps = betas, eps
        # Continual backprop changes weights between update and projection.
        axes = [None if config.continual_backprop else whole_axis(pieces, h) for h in pieces.held]
        self.already_unit = frozenset(i for i, axis in enumerate(axes) if axis is not None)
        check_adamw(self.weights, axes, betas, eps)
        self.table = table(self.weights, self.keep("exp_avg"), self.keep("exp_avg_sq"), axes)
        self.multipliers, self.decays = (
            torch.tensor(each, dtype=torch.float64, device=self.updates.device)
            for each in (self.lr_multipliers, self.weight_decays)
        )

    def update(self, lr: float, gradients: Tensors) -> None:
        t = self.updates.clamp(min=1)
        update(self.table, gradients, lr * self.multipliers, self.decays, t, self.betas, self.eps, self.left_out)
