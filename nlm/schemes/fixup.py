"""Fixup: no norms, but an init that keeps the first update Θ(lr) at any depth (Zhang et al. 2019, arXiv:1901.09321)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nlm.anatomy import READS, WRITES, Role, Site, Weight
from nlm.schemes.base import Branch, Growth, Learned, Residual, Scheme, Slot, Slots


def fixup(x: Tensor, f: Branch, shift: Tensor, scale: Tensor) -> Tensor:
    return x + scale * f(x + shift)


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    return x + shift


@dataclass(frozen=True, kw_only=True)
class Fixup(Scheme):
    """The three rules of section 3: what ends a branch, and the head, start at 0; the other matrices of a branch with m
    of them are smaller by K^(-1/(2m-2)) for the model's K branches, 2L or, with an encoder of N layers and a decoder of
    M, 2N + 3M (m = 4 in attention, 2 in the FFN, whose gate counts with its up); a learned number shifts what each
    matrix and each activation reads, another scales the branch.

    In attention only what it reads is shifted, as in the authors' Transformer.
    """

    growth: ClassVar[Growth] = "exponential"

    def residual(self, site: Site) -> Residual:
        return Residual(fixup, shift=Learned((), 0.0), scale=Learned((), 1.0))

    def slots(self, site: Site) -> Slots:
        if site.kind != "ffn":
            return {}
        return {slot: Slot(shifted, shift=Learned((), 0.0)) for slot in ("gate", "up", "hidden")}

    def std(self, weight: Weight) -> float:
        if weight.role in WRITES | {Role.HEAD}:
            return 0.0
        std = super().std(weight)
        if weight.role in READS and weight.site:
            matrices = 2 if weight.site.kind == "ffn" else 4
            std *= (weight.site.branches + weight.site.other_branches) ** (-1 / (2 * matrices - 2))
        return std
