"""ReZero converges faster than Post-LN, and needs no warmup."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses


def measure() -> list[Check]:
    post_ln = losses("post_ln", optim={"warmup_steps": 30})
    return [less("loss", "ReZero", losses("rezero"), "Post-LN with warmup", post_ln)]


CLAIM = Claim(
    {"schemes": ("rezero",)},
    "Bachlechner et al. 2020, arXiv:2003.04887",
    "A ReZero Transformer of 12 layers, without norms and warmup, converges faster than one with Post-LN and warmup",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("rezero_faster")
