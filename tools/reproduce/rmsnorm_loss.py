"""RMSNorm is as good as LayerNorm."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, losses


def trained(norm: str) -> list[float]:
    return losses("pre_ln", {"n_layers": 6, "norm": norm})


def measure() -> list[Check]:
    return [as_good("RMSNorm", trained("rmsnorm"), "LayerNorm", trained("layernorm"))]


CLAIM = Claim(
    {"norms": ("rmsnorm",)},
    "Zhang & Sennrich 2019, arXiv:1910.07467",
    "Without re-centring the quality stays",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("rmsnorm_loss")
