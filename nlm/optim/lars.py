"""LARS and LAMB: each matrix moves in proportion to its own norm (You et al. 2017, arXiv:1708.03888; You et al. 2020,
arXiv:1904.00962, algorithms 1 and 2).

That is for the weights that the scheme lets decay; gains, biases and other vectors move as they do without it.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from nlm.config import Betas, Fraction, OptimConfig
from nlm.optim.adam import Adam
from nlm.optim.base import Descent, Tensors
from nlm.parallel.pieces import Pieces


class Trusting(Descent):
    """`trusted` [P]: the parameters that decay."""

    def __init__(self, pieces: Pieces, config: OptimConfig) -> None:
        super().__init__(pieces, config)
        self.trusted = pieces.which(lambda weight: pieces.scheme.group(weight).weight_decay > 0)

    def trust(self, directions: Tensors, ratios: Tensor) -> None:
        """In place: u times the trust ratio [P], 1 where that is 0, not finite or of no trusted parameter."""
        good = self.trusted & ratios.isfinite() & (ratios > 0)
        torch._foreach_mul_(directions, self.pieces.each(ratios.where(good, 1)))


class LAMB(Trusting):
    """u = r + λ w, times ‖w‖ / ‖u‖, where r is Adam's direction."""

    def __init__(
        self, pieces: Pieces, config: OptimConfig, *, betas: Betas = (0.9, 0.999), eps: PositiveFloat = 1e-6
    ) -> None:
        super().__init__(pieces, config)
        self.adam = Adam(self, betas, eps)

    def direct(self, gradients: Tensors) -> None:
        self.adam(gradients)
        self.decay(gradients)
        self.trust(gradients, self.pieces.norms(self.weights) / self.pieces.norms(gradients))


class LARS(Trusting):
    """b ← μ b + η ‖w‖ / (‖g‖ + λ ‖w‖) · (g + λ w); u = b."""

    def __init__(
        self,
        pieces: Pieces,
        config: OptimConfig,
        *,
        momentum: Fraction = 0.9,
        trust: PositiveFloat = 1e-3,
        eps: PositiveFloat = 1e-8,
    ) -> None:
        super().__init__(pieces, config)
        self.momentum, self.eta, self.eps = momentum, trust, eps
        decays = [config.weight_decay * pieces.scheme.group(w).weight_decay for w in pieces.weights.values()]
        self.lambdas = torch.tensor(decays, dtype=torch.float64, device=pieces.mesh.device)
        self.b = self.keep("momentum")

    def direct(self, gradients: Tensors) -> None:
        w, g = self.pieces.norms(self.weights), self.pieces.norms(gradients)
        self.decay(gradients)
        self.trust(gradients, (self.eta * w / (g + self.lambdas * w + self.eps)).where(g > 0, 1))
        self.add(self.b, gradients, self.momentum, 1.0)
        torch._foreach_copy_(gradients, self.b)
