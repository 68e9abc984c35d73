"""AdamP and SGDP: of a scale-invariant weight only the direction is updated (Heo et al. 2021, arXiv:2006.08217,
algorithms 1 and 2)."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from nlm.anatomy import MATRICES
from nlm.config import Betas, Fraction, OptimConfig
from nlm.optim.adam import Adam
from nlm.optim.base import Descent, Tensors
from nlm.optim.slices import Slices, products
from nlm.parallel.pieces import Pieces

EPS = 1e-8
"""What counts as the norm of a weight or gradient that is smaller, as in the authors' code."""


class Projected(Descent):
    """A matrix counts as scale-invariant where its gradient is nearly at right angles to it: |cos(g, w)| < δ / √n of
    every row of n elements, or else of the whole matrix. Its updates lose their component along w, by row or whole,
    and it decays by `wd_ratio` of what others do.

    `projected` [P]: of which parameters the last step was so.
    """

    def __init__(self, pieces: Pieces, config: OptimConfig, delta: float, wd_ratio: float) -> None:
        super().__init__(pieces, config)
        self.wd_ratio = wd_ratio
        self.rows = rows = Slices(pieces, over=1)
        matrices = pieces.which(lambda weight: weight.role in MATRICES)
        self.row_limits = delta / rows.lengths.double().sqrt() * matrices
        self.whole_limits = delta / rows.sizes.double().sqrt() * matrices
        self.by_row = self.as_whole = self.projected = torch.zeros_like(matrices)

    def judge(self, gradients: Tensors) -> None:
        """Which weights are scale-invariant, by the gradients of this step."""
        w = self.weights
        sums = self.rows.sums(products(gradients, w), products(gradients, gradients), products(w, w))
        self.by_row = self.rows.greatest(_cosine(*sums)) < self.row_limits
        self.squares = sums[2]
        self.as_whole = ~self.by_row & (_cosine(*self.rows.total(sums)) < self.whole_limits)
        self.projected = self.by_row | self.as_whole

    def project(self, directions: Tensors) -> None:
        """u ← u − ŵ ⟨ŵ, u⟩ for the weights that were judged so, in place."""
        rows, w = self.rows, self.weights
        sums = torch.stack([rows.sums(products(w, directions))[0], self.squares])
        by_row, as_whole = _coefficient(*sums), _coefficient(*rows.total(sums))
        radial = by_row.where(self.by_row[rows.owner], as_whole.where(self.as_whole, 0)[rows.owner])
        torch._foreach_sub_(directions, torch._foreach_mul(w, rows.spread(radial)))

    def decay_less(self, directions: Tensors, factor: float = 1.0) -> None:
        self.decay(directions, self.pieces.each(factor * (1 - self.projected.double() * (1 - self.wd_ratio))))


class AdamP(Projected):
    def __init__(
        self,
        pieces: Pieces,
        config: OptimConfig,
        *,
        betas: Betas = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
        delta: PositiveFloat = 0.1,
        wd_ratio: PositiveFloat = 0.1,
    ) -> None:
        super().__init__(pieces, config, delta, wd_ratio)
        self.adam = Adam(self, betas, eps)

    def direct(self, gradients: Tensors) -> None:
        self.judge(gradients)
        self.adam(gradients)
        self.project(gradients)
        self.decay_less(gradients)


class SGDP(Projected):
    """b ← μ b + g; u = b, projected, + λ / (1 − μ) w, the decay that momentum would have made of λ w in g."""

    def __init__(
        self,
        pieces: Pieces,
        config: OptimConfig,
        *,
        momentum: Fraction = 0.9,
        delta: PositiveFloat = 0.1,
        wd_ratio: PositiveFloat = 0.1,
    ) -> None:
        super().__init__(pieces, config, delta, wd_ratio)
        self.momentum = momentum
        self.b = self.keep("momentum")

    def direct(self, gradients: Tensors) -> None:
        self.judge(gradients)
        self.add(self.b, gradients, self.momentum, 1.0)
        torch._foreach_copy_(gradients, self.b)
        self.project(gradients)
        self.decay_less(gradients, 1 / (1 - self.momentum))


def _cosine(gw: Tensor, gg: Tensor, ww: Tensor) -> Tensor:
    return gw.abs() / (gg.sqrt().clamp(min=EPS) * ww.sqrt().clamp(min=EPS))


def _coefficient(wu: Tensor, ww: Tensor) -> Tensor:
    """Of w in the component of u along it."""
    return wu / (ww.sqrt() + EPS).square()
