"""LAWN: first free, then on the sphere (Kolluri et al. 2021, "Logit Attenuating Weight Normalization").

UNVERIFIED: from a summary of the paper's algorithm, without its text or code. Ours is the choice of weights, those in
front of which and after which there is no norm to make their scale irrelevant: by default the head.
"""

from typing import Annotated, get_args

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from nlm.config import Betas, Matrix, OptimConfig
from nlm.optim.adam import Adam
from nlm.optim.base import Descent, Tensors
from nlm.optim.slices import Slices, products
from nlm.parallel.pieces import Pieces

Matrices = Annotated[tuple[Matrix, ...], Field(strict=False, min_length=1)]


class LAWN(Descent):
    """After `free_steps` updates the matrices of `roles` keep their norms: gradient and direction lose their components
    along w, and w is scaled back after the step. The learning rate warms up once more then, in `warmup_again` updates.

    They do not decay, before or after; the paper's recipe decays nothing (weight_decay = 0).
    """

    def __init__(
        self,
        pieces: Pieces,
        config: OptimConfig,
        *,
        free_steps: NonNegativeInt,
        warmup_again: NonNegativeInt = 0,
        roles: Matrices = ("head",),
        betas: Betas = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        super().__init__(pieces, config)
        self.free_steps, self.warmup_again = free_steps, warmup_again
        self.chosen = pieces.which(lambda weight: weight.role in roles)
        if not self.chosen.any():
            raise ValueError(
                f"optim.roles: the model has no weight of {', '.join(roles)}; choose of {', '.join(get_args(Matrix))}"
            )
        self.weight_decays = [
            0.0 if h.weight.role in roles else decay for h, decay in zip(pieces.held, self.weight_decays, strict=True)
        ]
        self.rows = Slices(pieces, over=1)
        self.adam = Adam(self, betas, eps)

    @property
    def constrained(self) -> Tensor:
        """[P] bool."""
        return self.chosen & (self.updates > self.free_steps)

    def update(self, lr: float, gradients: Tensors) -> None:
        before = self.pieces.norms(self.weights)
        super().update(lr, gradients)
        back = before / self.pieces.norms(self.weights)
        torch._foreach_mul_(self.weights, self.pieces.each(back.where(self.constrained, 1)))

    def direct(self, gradients: Tensors) -> None:
        self.project(gradients)
        self.adam(gradients)
        self.project(gradients)
        self.decay(gradients)
        if self.warmup_again:
            warm = ((self.updates - self.free_steps) / self.warmup_again).clamp(max=1)
            torch._foreach_mul_(gradients, warm.where(self.updates > self.free_steps, 1).to(gradients[0]))

    def project(self, vectors: Tensors) -> None:
        """v ← v − w ⟨v, w⟩ / ‖w‖² of the constrained, in place."""
        vw, ww = self.rows.total(self.rows.sums(products(vectors, self.weights), products(self.weights, self.weights)))
        radial = self.pieces.each((vw / ww).where(self.constrained, 0))
        torch._foreach_sub_(vectors, torch._foreach_mul(self.weights, radial))
