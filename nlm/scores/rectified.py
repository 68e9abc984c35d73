"""Weights that no softmax makes sum to 1: ReLA and sigmoid attention."""

from math import log

import torch
from torch import Tensor, nn

from nlm.anatomy import Role
from nlm.norms import NormSite, RMSNorm
from nlm.scores.base import Heads, Weighed


class ReLA(Weighed):
    """Rectified linear attention: γ ⊙ z / rms(z) ⊙ σ(u ⊙ z) with z = ReLU(q kᵀ / sqrt(Dh)) v, the root mean square over
    all heads together (Zhang et al. 2021, arXiv:2104.07012, eqs. 5 and 7: ReLA-g).

    Without the norm z would grow with the number of keys. The gate's u starts at 0, the mean of what its authors draw.
    """

    roles = {"gate": Role.SCALE}
    initial = {"gate": 0.0}

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        width = heads.query * heads.head_dim
        self.norm = RMSNorm(NormSite(width, heads.tp, heads.norm_eps))
        self.spans = {"gate": (width,)}
        self.gate = nn.Parameter(torch.empty(len(width)))

    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        return pairs.relu() * visible

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        z = super().attend(q, k, v, mask).flatten(2)  # [B S H·Dh]
        return (self.norm(z) * (self.gate * z).sigmoid()).view_as(q)


class Sigmoid(Weighed):
    """σ(q kᵀ / sqrt(Dh) + b) v (Ramapuram et al. 2024, arXiv:2409.04431, eq. 3).

    `bias` is by default their b = -ln T of the training context length T, with which the weights of T keys sum to about
    1 at the start.
    """

    def __init__(self, heads: Heads, *, bias: float | None = None) -> None:
        super().__init__(heads)
        self.bias = -log(heads.seq_len) if bias is None else bias

    def weigh(self, pairs: Tensor, visible: Tensor) -> Tensor:
        return (pairs + self.bias).sigmoid() * visible
