"""AdamW with half the optimizer state: both moments are kept in bfloat16, rounded at random so that the mean is right.

Rounded to the nearest, a moment would stand still once its changes are below a 512th of it: v with β₂ = 0.999 does.
Up or down with the probability that makes the expected value exact, it goes on (Gupta et al. 2015, arXiv:1502.02551,
section 3). The weights stay in float32.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from nlm.config import Betas, OptimConfig
from nlm.model import Held
from nlm.optim.base import Optimizer, Tensors
from nlm.parallel.pieces import Pieces
from nlm.random import hashed, words

DROPPED = 1 << 16
"""The bits of a float32 that bfloat16 has not, as a number: what is added at random before they are cut off."""


class AdamWBF16(Optimizer):
    """The equation of AdamW; one piece after another, so that there is but one piece's float32 at a time."""

    def __init__(
        self, pieces: Pieces, config: OptimConfig, *, betas: Betas = (0.9, 0.95), eps: PositiveFloat = 1e-8
    ) -> None:
        super().__init__(pieces, config)
        self.betas, self.eps = betas, eps
        self.m = self.keep("exp_avg", dtype=torch.bfloat16)
        self.v = self.keep("exp_avg_sq", dtype=torch.bfloat16)

    def update(self, lr: float, gradients: Tensors) -> None:
        (beta1, beta2), t = self.betas, self.updates.clamp(min=1)
        for i, (h, w, g) in enumerate(zip(self.pieces.held, self.weights, gradients, strict=True)):
            m = torch.lerp(g, self.m[i].to(g.dtype), beta1)
            v = torch.lerp(g * g, self.v[i].to(g.dtype), beta2)
            root = (v / (1 - beta2**t).to(v)).sqrt_().add_(self.eps)
            step = (m / (1 - beta1**t).to(m)).div_(root).mul_(lr * self.lr_multipliers[i])
            moved = (w * (1 - lr * self.lr_multipliers[i] * self.weight_decays[i])).sub_(step)
            keys = numbers(h, w.device)
            for state, new, number in ((self.m[i], m, 2 * self.updates), (self.v[i], v, 2 * self.updates + 1)):
                state.copy_(torch.where(self.left_out, state, rounded(new, keys, number)))
            w.copy_(torch.where(self.left_out, w, moved))


def numbers(h: Held, device: torch.device) -> Tensor:
    """A number for each element of a piece, the same in every layout, int64."""
    found = torch.full((1,) * len(h.spans), hashed(h.name) >> 16, dtype=torch.int64, device=device)
    stride = 1
    for dim, span in reversed(list(enumerate(h.spans))):
        places = torch.arange(span.start, span.stop, device=device) * stride
        found = found + places.view([-1 if d == dim else 1 for d in range(len(h.spans))])
        stride *= span.full
    return found


def rounded(x: Tensor, keys: Tensor, number: Tensor) -> Tensor:
    """x -> bfloat16, the neighbour above or below, each with the probability that makes x the mean; keys int64 of x's
    shape, another draw for every number []."""
    bits = x.float().view(torch.int32)
    bits = bits + (words(keys, number.long()) % DROPPED).int()
    return (bits & -DROPPED).view(torch.float32).bfloat16()
