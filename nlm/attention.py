"""The attention sublayer, its positions, and SCORES: how queries and keys become weights."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import Role, Span
from nlm.norms import RMSNorm, unit
from nlm.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Heads:
    """The shape of attention and this rank's part of it; `seq_len` is the context length of training."""

    query: Span
    kv: Span
    head_dim: int
    seq_len: int
    norm_eps: float
    tp: TensorParallel


class Softmax(nn.Module):
    """softmax(q kᵀ / sqrt(Dh)) v, causal (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[B S H Dh], [B S Hkv Dh] -> the same: what happens to queries and keys before positions."""
        return q, k

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B S H Dh], k and v [B S Hkv Dh] -> [B S H Dh]; `mask` [B 1 S S] says who sees whom, else it is causal."""
        return attention(q, k, v, mask, scale=None)


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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attention(unit(q) * self.g.to(q.dtype), unit(k), v, mask, scale=1.0)


class RMSQKNormHead(Softmax):
    """RMSNorm of each head's query and key, one gain [Dh] for all heads (Dehghani et al. 2023; Gemma 3)."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.q_norm = RMSNorm(Span.whole(heads.head_dim), heads.tp, heads.norm_eps)
        self.k_norm = RMSNorm(Span.whole(heads.head_dim), heads.tp, heads.norm_eps)

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


class RMSQKNormFull(Softmax):
    """RMSNorm of query and key over all heads together, gains [H·Dh] and [Hkv·Dh] (OLMo 2, 2025)."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.q_norm = RMSNorm(heads.query * heads.head_dim, heads.tp, heads.norm_eps)
        self.k_norm = RMSNorm(heads.kv * heads.head_dim, heads.tp, heads.norm_eps)

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)


SCORES: dict[str, type[Softmax]] = {
    "softmax": Softmax,
    "qknorm": QKNorm,
    "rms_qknorm_head": RMSQKNormHead,
    "rms_qknorm_full": RMSQKNormFull,
}


def document_mask(segments: Tensor) -> Tensor:
    """The document of each position [B S] -> [B 1 S S], true where position i sees j: j <= i in the same document."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """q [B S H Dh], k and v [B S Hkv Dh] -> [B S H Dh]; query head h attends with kv head h // (H / Hkv).

    Causal where there is no mask [B 1 S S].
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.to(q.dtype).transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34): pair i of position t turns by t · base^(-2i/Dh).

    A pair is a channel and its neighbour (`interleaved`, as in the paper) or its counterpart in the other half
    of the head (as in Llama). The tables [S 1 Dh] are shared by all layers and both carry the sign of the
    rotation, so that turning x is x · cos + swap(x) · sin.
    """

    def __init__(self, head_dim: int, seq_len: int, base: float, interleaved: bool) -> None:
        super().__init__()
        self.head_dim, self.base, self.interleaved = head_dim, base, interleaved
        shape = (seq_len, 1, head_dim)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)
        self.initial: dict[str, Callable[[], Tensor]] = {
            "cos": lambda: self._spread(self._angles().cos(), 1.0),
            "sin": lambda: self._spread(self._angles().sin(), -1.0),
        }

    def _angles(self) -> Tensor:
        channel = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        return torch.outer(
            torch.arange(self.cos.shape[0], dtype=torch.float64), self.base ** (-channel / self.head_dim)
        )

    def _spread(self, table: Tensor, sign: float) -> Tensor:
        pair = torch.stack([sign * table, table], dim=-1 if self.interleaved else -2)
        return pair.flatten(-2)[:, None, :]  # [S Dh/2] -> [S 1 Dh]

    def forward(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """-> cos, sin, each [S 1 Dh]."""
        if seq_len > self.cos.shape[0]:
            raise ValueError(f"{seq_len} positions asked of a model made for {self.cos.shape[0]}")
        return self.cos[:seq_len], self.sin[:seq_len]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B S H Dh], tables [S 1 Dh] -> [B S H Dh]."""
    if interleaved:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # [B S H Dh/2 2]
    else:
        swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def sinusoidal(seq_len: int, dim: int) -> Tensor:
    """-> [S D]: sin and cos of t / 10000^(2i/D) in alternating channels (Vaswani et al. 2017, section 3.5)."""
    channel = torch.arange(0, dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), 10_000.0 ** (-channel / dim))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[:, :dim]
