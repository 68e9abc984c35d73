"""Softmax attention, and what makes the logits of a softmax keep their size."""

from math import log, log2

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from nlm.activations import soft_cap
from nlm.anatomy import Role, Span
from nlm.norms import NormSite, RMSNorm, unit
from nlm.scores.base import Heads, PlacedScore, Weighed, products, softmax_attention


class Softmax(PlacedScore):
    """softmax(q kᵀ / sqrt(Dh)) v (Vaswani et al. 2017, eq. 1)."""

    sums_to_one = True

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """What is multiplied for the logits, and by which number."""
        return q, k, q.shape[-1] ** -0.5

    def pairs(self, q: Tensor, k: Tensor) -> Tensor:
        q, k, scale = self.scaled(q, k)
        return products(q, k) * scale

    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        return softmax(pairs, visible)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, scale = self.scaled(q, k)
        return softmax_attention(q, k, v, mask, scale)


class QKNorm(Softmax):
    """softmax(g · cos(q, k)) v with one learned scalar g a layer (Henry et al. 2020, arXiv:2010.04245).

    g starts at `g0`, by default log2(T² - T) of the training context length T (section 3.1).
    """

    roles = {"g": Role.SCALE}
    spans = {"g": (Span.whole(1),)}

    def __init__(self, heads: Heads, *, g0: float | None = None) -> None:
        super().__init__(heads)
        self.g = nn.Parameter(torch.empty(1))
        self.initial = {"g": log2(heads.seq_len**2 - heads.seq_len) if g0 is None else g0}

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        return unit(q) * self.g.to(q.dtype), unit(k), 1.0


class Cosine(Softmax):
    """softmax(τ_h cos(q, k)) v with a learned τ for each head, of which the logarithm is stored (Liu et al. 2021, Swin
    Transformer V2, arXiv:2111.09883, section 3.2): τ starts at 10 and is held below 100, as in their code."""

    roles = {"log_scale": Role.SCALE}
    initial = {"log_scale": log(10)}

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.spans = {"log_scale": (heads.query,)}
        self.log_scale = nn.Parameter(torch.empty(len(heads.query)))

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        scale = self.log_scale.clamp(max=log(100)).exp()[:, None].to(q.dtype)  # [H 1]
        return unit(q) * scale, unit(k), 1.0


class RMSQKNormHead(Softmax):
    """RMSNorm of each head's query and key, one gain [Dh] for all heads (Dehghani et al. 2023; Gemma 3)."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        at = NormSite(Span.whole(heads.head_dim), heads.tp, heads.norm_eps)
        self.q_norm, self.k_norm = RMSNorm(at), RMSNorm(at)

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


class RMSQKNormFull(Softmax):
    """RMSNorm of query and key over all heads together, gains [H·Dh] and [Hkv·Dh] (OLMo 2, 2025)."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.q_norm, self.k_norm = (
            RMSNorm(NormSite(part * heads.head_dim, heads.tp, heads.norm_eps)) for part in (heads.query, heads.kv)
        )

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)


class SoftCap(Weighed):
    """softmax(cap · tanh(q kᵀ / (cap · sqrt(Dh)))) v: no logit is above `cap` (Gemma 2, 2024, section 2)."""

    sums_to_one = True

    def __init__(self, heads: Heads, *, cap: PositiveFloat = 50.0) -> None:
        super().__init__(heads)
        self.cap = cap

    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        return softmax(soft_cap(pairs, self.cap), visible)


class TopK(Weighed):
    """Softmax over the `k` largest logits that a query sees, and those equal to the least of them; 0 for the others
    (Zhao et al. 2019, Explicit Sparse Transformer, arXiv:1912.11637, section 2)."""

    sums_to_one = True

    def __init__(self, heads: Heads, *, k: PositiveInt = 16) -> None:
        super().__init__(heads)
        self.k = k

    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        seen = pairs.detach().masked_fill(~visible, -torch.inf)
        least = seen.topk(min(self.k, seen.shape[-1]), dim=-1).values[..., -1:]
        return softmax(pairs, visible & (seen >= least))


def softmax(scores: Tensor, kept: Tensor) -> Tensor:
    """[B H S S] -> [B H S S]: over the keys that are `kept` [… S S]."""
    return scores.masked_fill(~kept, -torch.inf).softmax(-1)
