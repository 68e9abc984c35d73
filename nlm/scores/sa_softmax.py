"""Self-adjust softmax: weights that keep a gradient where softmax saturates (Zheng et al. 2025, arXiv:2502.18277)."""

from torch import Tensor

from nlm.scores.base import Heads, Weighed
from nlm.scores.softmax import softmax


class SASoftmax(Weighed):
    """With p = softmax(s): s · p, or `normalized`, which is their recommendation, p (s - min) / (max - min) with
    min = min(s_min, 0) and max = max(s_max, 0) over the keys that a query sees.

    `detach`: no gradient flows through min and max. In the released code it does, and then the factor of the largest
    logit is constantly 1, so that its weight has softmax's own vanishing gradient: with the top logit 20 above 15
    others |∂w/∂s| is 3e-8, detached 0.05. What the paper claims thus holds only detached, which is the default here.
    """

    def __init__(self, heads: Heads, *, normalized: bool = True, detach: bool = True) -> None:
        super().__init__(heads)
        self.normalized, self.detach = normalized, detach

    def weigh(self, scores: Tensor, visible: Tensor) -> Tensor:
        p = softmax(scores, visible)
        if not self.normalized:
            return scores * p
        bounds = (scores.detach() if self.detach else scores) * visible  # 0 where unseen, which min and max include
        low, high = bounds.amin(-1, keepdim=True).clamp(max=0), bounds.amax(-1, keepdim=True).clamp(min=0)
        return p * (scores - low) / (high - low + 1e-10)
