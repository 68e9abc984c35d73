"""BatchNorm falls behind LayerNorm on text, in encoders."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import encoders, less


def measure() -> list[Check]:
    return [less("loss", "LayerNorm", encoders("layernorm"), "BatchNorm", encoders("batchnorm"))]


CLAIM = Claim(
    {"norms": ("batchnorm",)},
    "Shen et al. 2020, arXiv:2003.07845",
    "BatchNorm is worse than LayerNorm on text, whose batch statistics fluctuate (here in encoders)",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("batchnorm_loss")
