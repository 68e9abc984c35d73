"""RMSNorm is as good as LayerNorm."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, decoders


def measure() -> list[Check]:
    return [as_good("RMSNorm", decoders(norm="rmsnorm"), "LayerNorm", decoders(norm="layernorm"))]


CLAIM = Claim(
    {"norms": ("rmsnorm",)},
    "Zhang & Sennrich 2019, arXiv:1910.07467",
    "Without re-centring the quality stays",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("rmsnorm_loss")
