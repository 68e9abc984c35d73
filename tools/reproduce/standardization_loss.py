"""Weight standardization before a norm speeds learning up."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses

BEFORE_NORM = ["o", "down"]
"""Of Peri-LN: what it says is of weights whose outputs are normalized."""


def measure() -> list[Check]:
    standardized = {"name": "weight_standardization", "roles": BEFORE_NORM}
    with_it = losses("peri_ln", {"n_layers": 6, "weight_norm": standardized})
    return [less("loss", "standardized", with_it, "plain", losses("peri_ln", {"n_layers": 6}))]


CLAIM = Claim(
    {"weight_norms": ("weight_standardization",)},
    "Qiao et al. 2019, arXiv:1903.10520",
    "Weights of mean 0 and variance 1 in each row make the loss smoother, and training faster",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("standardization_loss")
