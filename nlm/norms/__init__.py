"""Norm layers, usable wherever a scheme says `Norm()`, and NORMS, the choice by name."""

from nlm.norms.batch import BatchNorm, PowerNorm, UnifiedNorm
from nlm.norms.elementwise import ELN, DyISRU, DyT
from nlm.norms.frozen import FrozenLayerNorm, FrozenRMSNorm, NoNorm
from nlm.norms.token import LayerNorm, NormLayer, NormSite, PartialRMSNorm, RMSNorm, ScaleNorm, precise, unit

NORMS: dict[str, type[NormLayer]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "prmsnorm": PartialRMSNorm,
    "scalenorm": ScaleNorm,
    "dyt": DyT,
    "dyisru": DyISRU,
    "eln": ELN,
    "frozen_layernorm": FrozenLayerNorm,
    "frozen_rmsnorm": FrozenRMSNorm,
    "powernorm": PowerNorm,
    "unified": UnifiedNorm,
    "batchnorm": BatchNorm,
    "none": NoNorm,
}

__all__ = ["NORMS", "LayerNorm", "NormSite", "RMSNorm", "precise", "unit"]
