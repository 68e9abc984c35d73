"""SkipInit trains a deep model without norms; branches that start at full size do not."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import losses, trains


def deep(alpha: float) -> list[float]:
    return losses("skipinit", {"n_layers": 32, "scheme": {"name": "skipinit", "alpha": alpha}})


def measure() -> list[Check]:
    return [trains("α = 0", deep(0.0)), trains("α = 1", deep(1.0), fails=True)]


CLAIM = Claim(
    {"schemes": ("skipinit",)},
    "De & Smith 2020, arXiv:2002.10444",
    "Deep residual networks train without norms if a learned number on each branch starts at 0, not at 1",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("skipinit_trains")
