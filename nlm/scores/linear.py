"""Linear attention: no softmax, but a norm on what is multiplied (Cao 2021, arXiv:2105.14995; Meng et al. 2025)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import Role, Span
from nlm.norms import precise
from nlm.scores.base import Heads, Keep, Place, PlacedScore, Score, for_each_query, linear_attention, n_visible
from nlm.signals import Watch


class HeadNorm(nn.Module):
    """[B S H Dh] -> [B S H Dh]: LayerNorm of each head, with a gain and a bias of its own."""

    roles = {"weight": Role.NORM, "bias": Role.BIAS}
    initial = {"weight": 1.0, "bias": 0.0}

    def __init__(self, heads: Span, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.spans = {name: (heads, Span.whole(head_dim)) for name in self.roles}
        self.weight, self.bias = (nn.Parameter(torch.empty(len(heads), head_dim)) for _ in self.roles)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), self.weight)


class Linear(Score):
    """A score without a softmax: each pair weighs as much as it is."""

    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        return pairs * visible


class Fourier(Linear, PlacedScore):
    """(LN(q) LN(k)ᵀ / sqrt(Dh)) v / t, the mean over the t keys that a query sees.

    The paper divides by the sequence's length, of which a causal model may not know at its early positions.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.q_norm, self.k_norm = (HeadNorm(n, heads.head_dim, heads.norm_eps) for n in (heads.query, heads.kv))

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out = linear_attention(q, for_each_query(k, q), for_each_query(v, q), mask)
        return out / n_visible(q, mask) * q.shape[-1] ** -0.5


class Galerkin(Linear, PlacedScore):
    """q (LN(k)ᵀ LN(v)) / t, the mean over the t keys that a query sees, as of Fourier."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.k_norm, self.v_norm = (HeadNorm(heads.kv, heads.head_dim, heads.norm_eps) for _ in range(2))

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, self.k_norm(k)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out = linear_attention(q, for_each_query(k, q), for_each_query(self.v_norm(v), q), mask)
        return out / n_visible(q, mask)


class NaLaFormer(Linear):
    """Norm-aware linear attention: a query's length sets the power p = 3 (½ + tanh ‖q‖) to which its direction is
    raised, so that long queries attend sharply, as under softmax (Meng et al. 2025, arXiv:2506.21137).

    As the released code has it, positive and negative parts side by side, k cubed, positions in the numerator only;
    the image model's convolution and gate are left out. Sums are over the keys that a query sees.
    """

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
        q, k = precise(q), precise(k)
        length = q.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        power = 3 * (0.5 + length.tanh())
        # Of 0 to a power the gradient is 0, but ln 0 would come up in it.
        q_parts = [(part / length).clamp(min=1e-6) ** power for part in (q.relu(), (-q).relu())]
        k_parts = [part.relu() for part in (k**3, -(k**3))]

        q_features, k_features = (torch.cat(parts, -1) for parts in (q_parts, k_parts))  # [B S H 2·Dh]
        q_placed, k_placed = (
            torch.cat([place(part) for part in parts], -1) for place, parts in ((place_q, q_parts), (place_k, k_parts))
        )
        if watch is not None:
            self.show(watch, q_placed, k_placed, lengths=(q, k))
        if keep is not None:
            k_features, k_placed, v = keep(k_features, k_placed, v)
        k_features, k_placed, v = (for_each_query(x, q) for x in (k_features, k_placed, v))
        ones = torch.ones_like(k_features[..., :1])
        total = linear_attention(q_features, k_features, ones, mask) + 1e-6 * n_visible(q, mask)
        return linear_attention(q_placed, k_placed, v, mask) / total
