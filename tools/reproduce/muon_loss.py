"""Muon is ahead of AdamW after as many steps."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import best, less, lowest

MODEL = {"n_layers": 6}
RATES = (3e-3, 1e-2, 3e-2)


def measure() -> list[Check]:
    muon, adamw = (best(RATES, "pre_ln", MODEL, optim={"name": name}) for name in ("muon", "adamw"))
    i, j = lowest(muon), lowest(adamw)
    return [less("loss", f"Muon at lr {RATES[i]:g}", muon[i], f"AdamW at {RATES[j]:g}", adamw[j])]


CLAIM = Claim(
    {"optimizers": ("muon",)},
    "Jordan et al. 2024, Muon; Liu et al. 2025, arXiv:2502.16982",
    "Orthogonalized momentum learns faster a step than AdamW, each at its best rate",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("muon_loss")
