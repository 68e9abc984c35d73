"""Normalization schemes, one file each. A new scheme is a new file and one line here."""

from nlm.schemes.base import Scheme
from nlm.schemes.brainformer import Brainformer
from nlm.schemes.branch_scaled import BranchScaled
from nlm.schemes.deepnorm import DeepNorm
from nlm.schemes.fixup import Fixup
from nlm.schemes.layernorm_scaling import LayerNormScaling
from nlm.schemes.layerscale import LayerScale
from nlm.schemes.nf import NF
from nlm.schemes.ngpt import NGPT
from nlm.schemes.norm_free import NormFree
from nlm.schemes.normformer import NormFormer
from nlm.schemes.olmo2 import OLMo2
from nlm.schemes.peri_ln import PeriLN
from nlm.schemes.post_ln import PostLN
from nlm.schemes.pre_ln import PreLN
from nlm.schemes.rezero import ReZero
from nlm.schemes.sandwich_ln import SandwichLN
from nlm.schemes.skipinit import SkipInit
from nlm.schemes.sub_ln import SubLN
from nlm.schemes.t_fixup import TFixup
from nlm.schemes.without_tears import WithoutTears

SCHEMES: dict[str, type[Scheme]] = {
    "pre_ln": PreLN,
    "post_ln": PostLN,
    "deepnorm": DeepNorm,
    "sub_ln": SubLN,
    "peri_ln": PeriLN,
    "sandwich_ln": SandwichLN,
    "normformer": NormFormer,
    "olmo2": OLMo2,
    "without_tears": WithoutTears,
    "ngpt": NGPT,
    "layernorm_scaling": LayerNormScaling,
    "branch_scaled": BranchScaled,
    "layerscale": LayerScale,
    "skipinit": SkipInit,
    "rezero": ReZero,
    "fixup": Fixup,
    "t_fixup": TFixup,
    "nf": NF,
    "norm_free": NormFree,
    "brainformer": Brainformer,
}
