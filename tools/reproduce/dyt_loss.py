"""DyT is as good as LayerNorm."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, decoders


def measure() -> list[Check]:
    return [as_good("DyT", decoders(norm="dyt"), "LayerNorm", decoders(norm="layernorm"))]


CLAIM = Claim(
    {"norms": ("dyt",)},
    "Zhu et al. 2025, arXiv:2503.10622",
    "A tanh in the place of every norm matches the loss with norms",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("dyt_loss")
