"""Two sublayers of attention in eight do better than four, at equal size."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses

MODEL = {"n_layers": 8, "ffn_dim": 64}
"""Attention has 4 D² weights and, with F = 2 D, the FFN has as many; the paper's FFNs have that width too."""
STEPS = {"steps": 150}


def measure() -> list[Check]:
    half = losses("pre_ln", MODEL | {"scheme": {"name": "pre_ln", "residual_init": False}}, train=STEPS)
    return [less("loss", "2 : 6", losses("brainformer", MODEL, train=STEPS), "4 : 4", half)]


CLAIM = Claim(
    {"schemes": ("brainformer",)},
    "Zhou et al. 2023, arXiv:2306.00008",
    "More FFNs than attention, two to six in a block of eight, are worth more than taking turns",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("brainformer_proportion")
