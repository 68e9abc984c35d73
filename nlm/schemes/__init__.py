"""Normalization schemes, one file each. A new scheme is a new file and one line here."""

from nlm.schemes.base import Scheme
from nlm.schemes.deepnorm import DeepNorm
from nlm.schemes.ngpt import NGPT
from nlm.schemes.normformer import NormFormer
from nlm.schemes.peri_ln import PeriLN
from nlm.schemes.post_ln import PostLN
from nlm.schemes.pre_ln import PreLN
from nlm.schemes.sub_ln import SubLN

SCHEMES: dict[str, type[Scheme]] = {
    "pre_ln": PreLN,
    "post_ln": PostLN,
    "deepnorm": DeepNorm,
    "sub_ln": SubLN,
    "peri_ln": PeriLN,
    "normformer": NormFormer,
    "ngpt": NGPT,
}
