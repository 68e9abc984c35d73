"""Adafactor: of second moments only the means over rows and columns are kept (Shazeer & Stern 2018, arXiv:1804.04235,
algorithms 4 to 6)."""

import torch
from pydantic import PositiveFloat

from nlm.config import OptimConfig
from nlm.optim.base import Descent, Tensors
from nlm.optim.slices import Slices, products
from nlm.parallel.pieces import Pieces


class Adafactor(Descent):
    """v = R C / mean(R), R and C averages with β₂ = 1 − t^−`decay` of the means of g² + ε over rows and columns.

    u = g / √v, divided by max(1, RMS(u) / `update_clip`); with `relative`, times the parameter's own RMS, at least
    `least_rms`. The learning rate is the schedule's, and there is no first moment. Of a vector, one row, C is v itself.
    """

    def __init__(
        self,
        pieces: Pieces,
        config: OptimConfig,
        *,
        decay: PositiveFloat = 0.8,
        update_clip: PositiveFloat = 1.0,
        eps: PositiveFloat = 1e-30,
        relative: bool = False,
        least_rms: PositiveFloat = 1e-3,
    ) -> None:
        super().__init__(pieces, config)
        self.exponent, self.update_clip, self.eps = decay, update_clip, eps
        self.relative, self.least_rms = relative, least_rms
        self.rows, self.columns = Slices(pieces, over=1), Slices(pieces, over=0)
        self.root_sizes = self.rows.sizes.double().sqrt()
        self.r = self.share("exp_avg_sq_row", self.rows)
        self.c = self.share("exp_avg_sq_col", self.columns)

    def direct(self, gradients: Tensors) -> None:
        rows, columns, pieces = self.rows, self.columns, self.pieces
        beta2 = 1 - self.t**-self.exponent
        for slices, state in ((rows, self.r), (columns, self.c)):
            squares = slices.sums(products(gradients, gradients))[0]
            self.average([state], [squares / slices.lengths[slices.owner] + self.eps], beta2)
        mean = rows.total(self.r) / columns.lengths
        torch._foreach_mul_(gradients, rows.spread((self.r / mean[rows.owner]).rsqrt()))
        torch._foreach_mul_(gradients, columns.spread(self.c.rsqrt()))
        scales = 1 / (pieces.norms(gradients) / self.root_sizes / self.update_clip).clamp(min=1)
        if self.relative:
            scales *= (pieces.norms(self.weights) / self.root_sizes).clamp(min=self.least_rms)
        torch._foreach_mul_(gradients, pieces.each(scales))
        self.decay(gradients)
