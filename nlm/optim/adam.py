"""Adam's direction, of which several optimizers make their own (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1)."""

from collections.abc import Sequence

import torch

from nlm.optim.base import Descent, Tensors


class Adam:
    """u = m̂ / (√v̂ + ε) of all pieces of an optimizer, or of the `chosen` ones, whose state it keeps."""

    def __init__(
        self, optimizer: Descent, betas: tuple[float, float], eps: float, chosen: Sequence[int] | None = None
    ) -> None:
        self.optimizer, self.betas, self.eps = optimizer, betas, eps
        self.chosen = range(len(optimizer.weights)) if chosen is None else chosen
        self.m, self.v = optimizer.keep("exp_avg", self.chosen), optimizer.keep("exp_avg_sq", self.chosen)

    def __call__(self, gradients: Tensors) -> None:
        """In place: the gradients become the directions."""
        if not self.chosen:
            return
        g = [gradients[i] for i in self.chosen]
        (beta1, beta2), t = self.betas, self.optimizer.t
        self.optimizer.average(self.m, g, beta1)
        self.optimizer.average(self.v, torch._foreach_mul(g, g), beta2)
        root = torch._foreach_sqrt(self.v)
        torch._foreach_div_(root, (1 - beta2**t).sqrt().to(g[0]))
        torch._foreach_add_(root, self.eps)
        torch._foreach_copy_(g, self.m)
        torch._foreach_div_(g, (1 - beta1**t).to(g[0]))
        torch._foreach_div_(g, root)
