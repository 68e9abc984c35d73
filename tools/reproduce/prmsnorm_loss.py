"""RMSNorm by a sixteenth of the channels is as good as LayerNorm."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, decoders


def measure() -> list[Check]:
    return [as_good("pRMSNorm", decoders(norm="prmsnorm"), "LayerNorm", decoders(norm="layernorm"))]


CLAIM = Claim(
    {"norms": ("prmsnorm",)},
    "Zhang & Sennrich 2019, arXiv:1910.07467",
    "The root mean square of 6.25 % of the channels, here of 2, is enough: the quality stays",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("prmsnorm_loss")
