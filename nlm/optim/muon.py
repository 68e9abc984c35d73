"""Muon: momentum of the blocks' matrices, made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon;
scaled as by Liu et al. 2025, arXiv:2502.16982, section 2.2)."""

from pydantic import PositiveFloat
from torch import Tensor

from nlm.anatomy import READS, WRITES
from nlm.config import Betas, Fraction, OptimConfig
from nlm.optim.adam import Adam
from nlm.optim.base import Descent, Tensors
from nlm.optim.whole import apply_whole
from nlm.parallel.pieces import Pieces

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial x ← a x + b x³ + c x⁵, which takes singular values to about 1 in the fewest steps."""
STEPS = 5


class Muon(Descent):
    """m ← μ m + (1 − μ) g; u = 0.2 √max(out, in) · orthogonal((1 − μ) g + μ m) + λ w.

    The factor makes the RMS of an update 0.2, about AdamW's, so that one learning rate and weight decay serve both: all
    other weights (embedding, head, vectors) are AdamW's, with `betas` and `eps`.
    """

    def __init__(
        self,
        pieces: Pieces,
        config: OptimConfig,
        *,
        momentum: Fraction = 0.95,
        betas: Betas = (0.9, 0.95),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        super().__init__(pieces, config)
        self.momentum = momentum
        self.names = [name for name in pieces.names if pieces.weights[name].role in READS | WRITES]
        inside = set(self.names)
        self.chosen = [i for i, h in enumerate(pieces.held) if h.name in inside]
        self.m = self.keep("momentum", self.chosen)
        self.adam = Adam(self, betas, eps, [i for i, h in enumerate(pieces.held) if h.name not in inside])

    def direct(self, gradients: Tensors) -> None:
        self.adam(gradients)
        u = [gradients[i] for i in self.chosen]
        self.average(self.m, u, self.momentum)
        for tensor, m in zip(u, self.m, strict=True):
            tensor.lerp_(m, self.momentum)
        apply_whole(direction, self.pieces, self.names, gradients)
        self.decay(gradients)


def direction(momentum: Tensor) -> Tensor:
    """[out in] -> [out in], of RMS about 0.2."""
    return 0.2 * max(momentum.shape) ** 0.5 * orthogonal(momentum)


def orthogonal(matrix: Tensor) -> Tensor:
    """[out in] -> [out in]: the singular values made nearly 1, by Newton-Schulz.

    In the matrix's own precision: in bfloat16, as published, rounding would tell one layout from another.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T
