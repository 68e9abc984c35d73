"""PowerNorm is better than LayerNorm, in encoders, as it was published."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import encoders, less


def measure() -> list[Check]:
    power = encoders({"name": "powernorm", "warmup_steps": 40})  # of 100, as 4,000 of the paper's are of all
    return [less("loss", "PowerNorm", power, "LayerNorm", encoders("layernorm"))]


CLAIM = Claim(
    {"norms": ("powernorm",)},
    "Shen et al. 2020, arXiv:2003.07845",
    "Dividing channels by their running quadratic mean is better than LayerNorm (here in encoders)",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("powernorm_loss")
