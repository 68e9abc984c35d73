"""Sandwich-LN's activations do not follow the weights' size."""

import torch

from nlm.anatomy import MATRICES
from nlm.model import weights
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, build, rms


@torch.no_grad()
def growth(scheme: str, factor: float = 10.0) -> list[float]:
    """Once a seed: what the last stream's RMS is multiplied by when all matrices of the blocks are by `factor`."""
    found = []
    for seed in SEEDS:
        model = build(scheme, seed)
        before = rms(model)[-1, 1, 2]
        for _, parameter, weight in weights(model):
            if weight.site and weight.role in MATRICES:
                parameter *= factor
        found.append(float(rms(model)[-1, 1, 2] / before))
    return found


def measure() -> list[Check]:
    return [
        Check("growth with weights x 10 of Sandwich-LN's stream", growth("sandwich_ln"), below=1.5, against=10.0),
        Check("of Pre-LN's", growth("pre_ln"), above=10.0),
    ]


CLAIM = Claim(
    {"schemes": ("sandwich_ln",)},
    "Ding et al. 2021, arXiv:2105.13290, section 2.4",
    "A norm after each sublayer keeps activations from exploding, whatever comes out of the sublayers",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("sandwich_ln_scale")
