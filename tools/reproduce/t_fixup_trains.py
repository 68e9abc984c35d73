"""T-Fixup trains without norms and warmup where the usual init does not."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import losses, trains

DEEP = {"n_layers": 32}


def measure() -> list[Check]:
    usual = losses("skipinit", DEEP | {"scheme": {"name": "skipinit", "alpha": 1.0}})
    return [trains("T-Fixup", losses("t_fixup", DEEP)), trains("the usual init", usual, fails=True)]


CLAIM = Claim(
    {"schemes": ("t_fixup",)},
    "Huang et al. 2020, ICML",
    "By its init alone a deep Transformer trains with Adam, without norms and without warmup",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("t_fixup_trains")
