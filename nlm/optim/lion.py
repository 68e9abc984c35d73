"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""

import torch

from nlm.config import Betas, OptimConfig
from nlm.optim.base import Descent, Tensors
from nlm.parallel.pieces import Pieces


class Lion(Descent):
    """u = sign(β₁ m + (1 − β₁) g) + λ w; m ← β₂ m + (1 − β₂) g.

    Every weight moves by lr: the paper takes a third to a tenth of AdamW's, and as much more weight decay.
    """

    def __init__(self, pieces: Pieces, config: OptimConfig, *, betas: Betas = (0.9, 0.99)) -> None:
        super().__init__(pieces, config)
        self.betas = betas
        self.m = self.keep("exp_avg")

    def direct(self, gradients: Tensors) -> None:
        beta1, beta2 = self.betas
        u = torch._foreach_lerp(gradients, self.m, beta1)
        self.average(self.m, gradients, beta2)
        torch._foreach_sign_(u)
        torch._foreach_copy_(gradients, u)
        self.decay(gradients)
