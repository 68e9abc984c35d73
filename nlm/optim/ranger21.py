"""Ranger21 (Wright & Demeure 2021, arXiv:2106.13731), from its list of components.

Two of them are keys of [optim] for any optimizer, `agc` and `centralize`; so is the schedule ("wsd"). Its authors'
code decays, and pulls to norm 1, the last parameter only, and divides the momentum by a noise norm made of β₂; here
it is all matrices, and the paper's. Neither has what the code means by `max_variance_ma` and does not do.
"""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from nlm.anatomy import MATRICES
from nlm.config import Betas, Fraction, OptimConfig
from nlm.optim.base import Descent, Tensors
from nlm.optim.slices import Slices, products
from nlm.parallel.pieces import Pieces


class Ranger21(Descent):
    """g ← g / std(g) of each parameter; v ← β₂ v + (1 − β₂) g², D = softplus(√v̂ + ε).

    Positive-negative momentum (Xie et al. 2021, arXiv:2103.17182): m ← β₁² m + (1 − β₁²) g of two m in turn, and
    u = (2 m_new − m_old) / √5 / (1 − β₁ᵗ) / D. Stable weight decay: u ← u + λ w / √mean(v̂), the mean over all
    parameters. Norm loss: u ← u + 2 η (1 − 1 / (‖w‖ + ε)) w for every row of a matrix. Lookahead (Zhang et al. 2019,
    arXiv:1907.08610): after every k-th update w ← slow ← slow + α (w − slow).
    """

    copies = ("slow",)

    def __init__(
        self,
        pieces: Pieces,
        config: OptimConfig,
        *,
        betas: Betas = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
        softplus: PositiveFloat = 50.0,
        norm_loss: NonNegativeFloat = 1e-4,
        lookahead_every: PositiveInt = 5,
        lookahead: Fraction = 0.5,
    ) -> None:
        super().__init__(pieces, config)
        self.betas, self.eps, self.softplus, self.norm_loss = betas, eps, softplus, norm_loss
        self.every, self.alpha = lookahead_every, lookahead
        self.rows = Slices(pieces, over=1)
        self.in_matrix = pieces.which(lambda weight: weight.role in MATRICES)[self.rows.owner]
        self.sizes = self.rows.sizes
        self.m_odd, self.m_even, self.v = self.keep("exp_avg_odd"), self.keep("exp_avg_even"), self.keep("exp_avg_sq")
        self.slow = self.keep("slow")
        torch._foreach_copy_(self.slow, self.weights)

    def update(self, lr: float, gradients: Tensors) -> None:
        super().update(lr, gradients)
        merges = (self.updates % self.every == 0) & ~self.left_out
        self.add(self.slow, self.weights, 1 - self.alpha, self.alpha, when=merges)
        for weight, slow in zip(self.weights, self.slow, strict=True):
            weight.copy_(slow.where(merges, weight))

    def direct(self, gradients: Tensors) -> None:
        (beta1, beta2), t, g = self.betas, self.t, gradients
        self.normalize(g)
        self.average(self.v, torch._foreach_mul(g, g), beta2)
        odd = t % 2 == 1
        for m, now in ((self.m_odd, odd), (self.m_even, ~odd)):
            self.average(m, g, beta1**2, when=now)
        new, old = torch.where(odd, 2.0, -1.0), torch.where(odd, -1.0, 2.0)
        factor = 1 / (5**0.5 * (1 - beta1**t))
        torch._foreach_copy_(g, torch._foreach_mul(self.m_odd, (new * factor).to(g[0])))
        torch._foreach_add_(g, torch._foreach_mul(self.m_even, (old * factor).to(g[0])))
        for u, v in zip(g, self.v, strict=True):
            u.div_(F.softplus((v / (1 - beta2**t)).sqrt() + self.eps, beta=self.softplus))

        vs, squares = self.rows.sums(self.v, products(self.weights, self.weights))
        mean_v = vs.sum() / (1 - beta2**t) / self.sizes.sum()
        stable = mean_v.rsqrt().where(mean_v > 0, 0)  # of a batch without targets there is no gradient
        self.decay(g, self.pieces.each(stable.expand(len(self.sizes))))
        pull = 2 * self.norm_loss * (1 - 1 / (squares.sqrt() + self.eps)) * self.in_matrix
        torch._foreach_add_(g, torch._foreach_mul(self.weights, self.rows.spread(pull)))

    def normalize(self, g: Tensors) -> None:
        """In place: g / std(g) of each parameter with more than two elements."""
        sums, squares = self.rows.total(self.rows.sums(g, products(g, g)))
        std = ((squares - sums.square() / self.sizes) / (self.sizes - 1)).clamp(min=0).sqrt() + self.eps
        torch._foreach_div_(g, self.pieces.each(std.where(self.sizes > 2, 1)))
