"""Self-adjust softmax has a gradient where softmax is saturated."""

import torch
from torch import Tensor

from nlm.anatomy import Span
from nlm.parallel.tensor import TensorParallel
from nlm.scores import Heads
from nlm.scores.sa_softmax import SASoftmax
from nlm.scores.softmax import softmax
from tools.reproduce.claim import Check, Claim

HEADS = Heads(Span.whole(1), Span.whole(1), head_dim=4, seq_len=16, norm_eps=1e-5, tp=TensorParallel())
VISIBLE = torch.ones(1, 16, dtype=torch.bool)


def gradient(normalized: bool | None, top: float = 10.0) -> float:
    """Of the largest weight by its logit, which is `top` above 15 others; None: of softmax."""
    logits = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    logits[..., 0] = top
    logits.requires_grad_()
    weights: Tensor = (
        softmax(logits, VISIBLE)
        if normalized is None
        else SASoftmax(HEADS, normalized=normalized).weigh(logits, VISIBLE)
    )
    weights[..., 0].sum().backward()
    assert logits.grad is not None
    return float(logits.grad[..., 0].abs())


def measure() -> list[Check]:
    return [
        Check("gradient of s·p / softmax's", [gradient(False) / gradient(None)], above=10.0),
        Check("of the normalized variant / softmax's", [gradient(True) / gradient(None)], above=10.0, against=2.0),
    ]


CLAIM = Claim(
    {"scores": ("sa_softmax",)},
    "Zheng et al. 2025, arXiv:2502.18277",
    "Both variants have a larger gradient than softmax where one logit is far above the others",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("sa_softmax_gradient")
