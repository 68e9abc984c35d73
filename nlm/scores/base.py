"""What a score function is, and the two ways in which its weights meet the values."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import Span
from nlm.norms import precise
from nlm.parallel.tensor import TensorParallel
from nlm.signals import View, Watch, squares, that_count

SATURATED = 0.95
"""The share of its weight from which on a query is said to see one key only (science: QKNorm's measure)."""

Place = Callable[[Tensor], Tensor]
"""What gives queries or keys [B S H Dh] their positions, and then what the scheme has for them."""
Keep = Callable[..., tuple[Tensor, ...]]
"""What is told what a score keeps of the positions that come [B Q …] and gives what it has kept of all [B S …]."""


@dataclass(frozen=True)
class Heads:
    """The shape of attention and this rank's part of it; `seq_len` is the context length of training."""

    query: Span
    kv: Span
    head_dim: int
    seq_len: int
    norm_eps: float
    tp: TensorParallel


class Score(nn.Module, ABC):
    """How queries and keys choose among values. Its keyword arguments are keys of [model.attention].

    In all methods: q [B S H Dh], k and v [B S Hkv Dh], query head h attends with kv head h // (H / Hkv). `mask`
    [B 1 S S] says who sees whom; without one, each position sees itself and those before. Where all queries see the
    same it may be [B 1 1 S]; and with a mask there may be another number of keys than of queries. With `keep`, queries,
    keys and values are of the Q positions that come, and the mask [B 1 Q S] is of these and all that there are.
    """

    sums_to_one = False
    """Whether the weights of the values do, of every query."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        place_q: Place,
        place_k: Place,
        watch: Watch | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """Queries, keys and values as the matrices give them -> [B S H Dh]. It shows signals.INSIDE."""

    def pairs(self, q: Tensor, k: Tensor) -> Tensor:
        """Some of the queries [B Q H Dh], all keys -> [B H Q S], what `weigh` takes: q·k / sqrt(Dh)."""
        return products(q, k) * q.shape[-1] ** -0.5

    @abstractmethod
    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        """[B H Q S] -> the weights of the values, 0 where `visible` [… Q S] is false."""

    def show(self, watch: Watch, q: Tensor, k: Tensor, lengths: tuple[Tensor, Tensor] | None = None) -> None:
        """signals.INSIDE of queries and keys that have their positions; `lengths` are those whose squares are shown,
        unless they are the same."""
        norms = zip(lengths or (q, k), (watch.view.positions, watch.view.keys), strict=True)
        watch.seen.append(torch.stack([*self._chosen(q, k, watch.view), *(squares(that_count(*of)) for of in norms)]))

    @torch.no_grad()
    def _chosen(self, q: Tensor, k: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Of the watched queries -> [] each: the sum of the entropies, in nats, of their weights, taken as shares of
        what the absolute weights sum to; how many give one key more than SATURATED; the largest of their `pairs`."""
        visible, watched = view.visible, queries(view.visible.shape[-2], q.shape[1], q.device)
        pairs = precise(self.pairs(q[:, watched], k))
        shares = self.weigh(pairs, visible)
        if view.positions is not None:
            count = view.positions[:, None, watched, None]
            shares, visible = shares.where(count, 0), visible & count
        if not self.sums_to_one:
            shares = F.normalize(shares.abs(), p=1, dim=-1)
        saturated = (shares.amax(-1) > SATURATED).sum(dtype=shares.dtype)
        return torch.special.entr(shares).sum(), saturated, pairs.masked_fill(~visible, -torch.inf).amax()


class PlacedScore(Score):
    """A score of queries and keys that have their positions."""

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What happens to queries and keys before."""
        return q, k

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """-> [B S H Dh]."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        place_q: Place,
        place_k: Place,
        watch: Watch | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        q, k = self.normalize(q, k)
        q, k = place_q(q), place_k(k)
        if watch is not None:
            self.show(watch, q, k)
        if keep is not None:
            k, v = keep(k, v)
        return self.attend(q, k, v, mask)


class Weighed(PlacedScore):
    """A score that computes all weights [B H S S] of a layer, in float32 or more; memory grows as S²."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = self.weigh(precise(self.pairs(q, k)), visible(q, mask))
        return torch.einsum("bhst,bthd->bshd", weights.to(v.dtype), for_each_query(v, q))


def products(q: Tensor, k: Tensor) -> Tensor:
    """[B Q H Dh], [B S Hkv Dh] -> [B H Q S]: of each query with each key."""
    return q.transpose(1, 2) @ for_each_query(k, q).permute(0, 2, 3, 1)


def for_each_query(x: Tensor, q: Tensor) -> Tensor:
    """[B S Hkv Dh] -> [B S H Dh], the head that each of q's heads attends with."""
    groups = q.shape[2] // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def visible(q: Tensor, mask: Tensor | None) -> Tensor:
    """-> [B 1 Q S] or [S S]: `mask`, or the causal one."""
    return torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril() if mask is None else mask


def n_visible(q: Tensor, mask: Tensor | None) -> Tensor:
    """-> [B Q 1 1] or [S 1 1]: how many keys each query sees."""
    if mask is None:
        return torch.arange(1, q.shape[1] + 1, device=q.device)[:, None, None]
    return mask.sum(-1).transpose(1, 2)[..., None]  # [B 1 Q] -> [B Q 1 1]


def queries(n: int, seq_len: int, device: torch.device) -> Tensor:
    """Of the positions so many [n]: the last one, and evenly back from it."""
    return seq_len - 1 - seq_len // n * torch.arange(n - 1, -1, -1, device=device)


def keys_seen(mask: Tensor | None, seq_len: int, n: int, device: torch.device) -> Tensor:
    """[B 1 Q S] or [1 1 Q S]: the keys that up to `n` of so many queries see, by the mask or the causal one."""
    n = min(n, seq_len)
    every = mask if mask is not None else torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device).tril()
    every = every.expand(-1, -1, seq_len, -1)
    return every[..., queries(n, seq_len, device), :]


def uniform_entropy(view: View, rows: int, seq_len: int) -> Tensor:
    """[2]: the sum over the watched queries of so many rows of the entropy, in nats, of equal weights; and how many
    they are."""
    entropies = view.visible.sum(-1).double().log().expand(rows, -1, -1)[:, 0]
    count = torch.ones_like(entropies)
    if view.positions is not None:
        count = view.positions[:, queries(entropies.shape[1], seq_len, count.device)].to(count)
    return torch.stack([(entropies * count).sum(), count.sum()])


def document_mask(segments: Tensor, causal: bool = True) -> Tensor:
    """The document of each position [B S] -> [B 1 S S], true where position i sees j: in the same document and, if
    `causal`, j <= i."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril() if causal else same


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, by default 1/sqrt(Dh), in torch's fused kernels."""
    # Compiled for any shape the comparison is no bool, until it is branched on.
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.to(q.dtype).transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        **grouped,
    )
    return out.transpose(1, 2)


CHUNK = 64
"""Positions that linear attention takes at once: within a chunk it computes all pairs, across chunks a state."""


def linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q and k [B S H E], v [B S H Dv] -> [B S H Dv], Σ (q_t·k_j) v_j over the j that t sees, in float32 or more; with
    a mask [B 1 Q S], of Q queries.

    Work and memory grow as S (Katharopoulos et al. 2020, arXiv:2006.16236, section 3.3), with a mask as S².
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = precise(q), precise(k), precise(v)
        if mask is not None:
            return torch.einsum("bhst,bthd->bshd", torch.einsum("bshe,bthe->bhst", q, k) * mask, v)
        seq_len = q.shape[1]
        q, k, v = (
            F.pad(x, (0, 0, 0, 0, 0, -seq_len % CHUNK)).unflatten(1, (-1, CHUNK)).transpose(2, 3) for x in (q, k, v)
        )  # [B S H E] -> [B N H C E]
        states = k.transpose(-1, -2) @ v  # [B N H E Dv]
        before = states.cumsum(1) - states
        within = (q @ k.transpose(-1, -2)).tril() @ v
        return (within + q @ before).transpose(2, 3).flatten(1, 2)[:, :seq_len]
