"""Transformers without Tears learn better without warmup than Pre-LN with LayerNorm."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses


def measure() -> list[Check]:
    tears = losses("without_tears", {"norm": "scalenorm"})
    return [less("loss", "ScaleNorm + FixNorm", tears, "Pre-LN", losses("pre_ln"))]


CLAIM = Claim(
    {"schemes": ("without_tears",), "norms": ("scalenorm",)},
    "Nguyen & Salazar 2019, arXiv:1910.05895",
    "On little data and without warmup, ScaleNorm, FixNorm and SmallInit do better than Pre-LN with LayerNorm",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("without_tears_loss")
