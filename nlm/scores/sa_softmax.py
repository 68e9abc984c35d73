"""Self-adjust softmax: weights that keep a gradient where softmax saturates (Zheng et al. 2025, arXiv:2502.18277)."""

from torch import Tensor

from nlm.scores.base import Heads, Weighed
from nlm.scores.softmax import softmax


class SASoftmax(Weighed):
    """With p = softmax(s): s · p, or `normalized`, which is their recommendation, p (s - min) / (max - min) with
    min = min(s_min, 0) and max = max(s_max, 0) over the keys that a query sees.

    In the released code gradients flow through min and max. Then the factor of the largest logit is constantly 1, and
    its weight has softmax's own vanishing gradient: with the top logit 20 above 15 others |∂w/∂s| is 3e-8, where s · p
    has 1. With `detach` it is 0.05; but a position that sees one key only then has the gradient 1/|s|, which nothing
    bounds. So neither is what the paper claims of its gradient: s · p is.
    """

    def __init__(self, heads: Heads, *, normalized: bool = True, detach: bool = False) -> None:
        super().__init__(heads)
        self.normalized, self.detach = normalized, detach

    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        p = softmax(pairs, visible)
        if not self.normalized:
            return pairs * p
        bounds = (pairs.detach() if self.detach else pairs) * visible  # 0 where unseen, which min and max include
        low, high = bounds.amin(-1, keepdim=True).clamp(max=0), bounds.amax(-1, keepdim=True).clamp(min=0)
        return p * (pairs - low) / (high - low + 1e-10)
