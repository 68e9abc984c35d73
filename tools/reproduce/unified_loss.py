"""UN is as good as LayerNorm, in encoders, as it was published."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, encoders


def measure() -> list[Check]:
    return [as_good("UN", encoders({"name": "unified", "warmup_steps": 40}), "LayerNorm", encoders("layernorm"))]


CLAIM = Claim(
    {"norms": ("unified",)},
    "Yang et al. 2022, arXiv:2208.01313",
    "Running statistics that can be folded into linear layers are on a par with LayerNorm (here in encoders)",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("unified_loss")
