"""Sub-LN bears a learning rate that Pre-LN does not."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses

HOT = {"lr": 3e-2}


def measure() -> list[Check]:
    return [less("loss", "Sub-LN", losses("sub_ln", optim=HOT), "Pre-LN", losses("pre_ln", optim=HOT))]


CLAIM = Claim(
    {"schemes": ("sub_ln",)},
    "Wang et al. 2022, arXiv:2210.06423",
    "Sub-LN allows larger learning rates than Pre-LN: at a rate ten times the usual it has the lower loss",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("sub_ln_rate")
