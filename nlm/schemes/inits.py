"""Initializations that do not come with a scheme, for schemes that leave it open; and INITS, the choice by name.

An init is the scheme it is put on with other rules for how matrices start, and perhaps for how they learn.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nlm.anatomy import READS, WRITES, Group, Kind, Role, Site, Weight
from nlm.schemes.base import NormPlace, Residual, Scheme, Slots, xavier
from nlm.weight_norms import MakeWeightNorm


@dataclass(frozen=True)
class Init(Scheme):
    """A scheme with another init; what it does in the forward stays its own."""

    scheme: Scheme

    def __post_init__(self) -> None:
        object.__setattr__(self, "growth", self.scheme.growth)

    def sublayers(self, layer: int, reads_memory: bool = False) -> tuple[Kind, ...]:
        return self.scheme.sublayers(layer, reads_memory)

    @property
    def lacks_two_stacks(self) -> str | None:
        return self.scheme.lacks_two_stacks

    @property
    def folds(self) -> bool:
        return self.scheme.folds

    @property
    def norm_place(self) -> NormPlace | None:
        return self.scheme.norm_place

    def residual(self, site: Site) -> Residual:
        return self.scheme.residual(site)

    def slots(self, site: Site) -> Slots:
        return self.scheme.slots(site)

    def std(self, weight: Weight) -> float:
        return self.scheme.std(weight)

    def group(self, weight: Weight) -> Group:
        return self.scheme.group(weight)

    def weight_norm(self, weight: Weight) -> MakeWeightNorm | None:
        return self.scheme.weight_norm(weight)

    def unit_axis(self, weight: Weight) -> int | None:
        return self.scheme.unit_axis(weight)


@dataclass(frozen=True)
class GPT2(Init):
    """N(0, 0.02²), what writes the stream smaller by 1/sqrt(2L) (Radford et al. 2019, section 2.3; their code).

    0.02 is the fan-in's 1/sqrt(D) at D = 2500; narrow models start with branches that are nearly off.
    """

    init_std: float = field(default=0.02, kw_only=True)

    def std(self, weight: Weight) -> float:
        return self.init_std * (weight.site.branches**-0.5 if weight.role in WRITES and weight.site else 1.0)


@dataclass(frozen=True)
class DSInit(Init):
    """Depth-scaled: layer l, counted from 1, starts at α / sqrt(l) of Xavier (Zhang et al. 2019, arXiv:1908.11365)."""

    alpha: float = field(default=1.0, kw_only=True)

    def std(self, weight: Weight) -> float:
        return xavier(weight, self.alpha * (weight.site.layer + 1) ** -0.5) if weight.site else super().std(weight)


@dataclass(frozen=True)
class MuP(Init):
    """Maximal update parametrization over width, for Adam (Yang et al. 2022, arXiv:2203.03466, table 3).

    optim.lr is that of a model `base_dim` wide, and holds for every width: matrices of the blocks start at the fan-in's
    scale and learn at base_dim / D of it, the head starts smaller by sqrt(base_dim / D) and learns as they do, the
    embedding neither. Heads are to grow in number, not in size; then the scale of attention is as it was.
    """

    base_dim: int = field(default=64, kw_only=True)

    def std(self, weight: Weight) -> float:
        fan_in = weight.shape[1] ** -0.5
        match weight.role:
            case Role.EMBED:
                return self.base_dim**-0.5
            case Role.HEAD:
                return fan_in * (self.base_dim / weight.shape[1]) ** 0.5
        return fan_in

    def group(self, weight: Weight) -> Group:
        group = super().group(weight)
        if weight.role in READS | WRITES | {Role.HEAD}:
            dim = weight.shape[0 if weight.role in WRITES else 1]
            return replace(group, lr=group.lr * self.base_dim / dim)
        return group


@dataclass(frozen=True)
class Orthogonal(Init):
    """Orthonormal rows or columns, whichever are fewer, times `gain` (Saxe et al. 2014, arXiv:1312.6120)."""

    gain: float = field(default=1.0, kw_only=True)

    def matrix(self, normal: Tensor, weight: Weight) -> Tensor:
        tall = normal if normal.shape[0] >= normal.shape[1] else normal.T
        q, r = torch.linalg.qr(tall)
        q *= r.diagonal().sign()  # without it the signs are those of the algorithm, not those that were drawn
        return self.gain * (q if tall is normal else q.T)


@dataclass(frozen=True)
class LSUV(Orthogonal):
    """Layer-sequential unit variance: orthonormal, then each matrix of the blocks scaled so that what it gives for
    random tokens has std 1, and what it writes into the stream 1/sqrt(2L) (Mishkin & Matas 2016, arXiv:1511.06422).

    The paper has 1 everywhere, by which the stream would grow as sqrt(1 + 2L). `nlm.calibrate` does the scaling.
    """

    def target(self, weight: Weight) -> float:
        return weight.site.branches**-0.5 if weight.role in WRITES and weight.site else 1.0


INITS: dict[str, type[Init]] = {
    "gpt2": GPT2,
    "ds_init": DSInit,
    "mup": MuP,
    "orthogonal": Orthogonal,
    "lsuv": LSUV,
}
