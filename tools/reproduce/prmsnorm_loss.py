"""RMSNorm by a sixteenth of the channels is as good as LayerNorm."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, losses


def trained(norm: str) -> list[float]:
    return losses("pre_ln", {"n_layers": 6, "norm": norm})


def measure() -> list[Check]:
    return [as_good("pRMSNorm", trained("prmsnorm"), "LayerNorm", trained("layernorm"))]


CLAIM = Claim(
    {"norms": ("prmsnorm",)},
    "Zhang & Sennrich 2019, arXiv:1910.07467",
    "The root mean square of 6.25 % of the channels, here of 2, is enough: the quality stays",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("prmsnorm_loss")
