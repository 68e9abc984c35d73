"""The stream of a Normalizer-Free network has the variance that its design predicts."""

import numpy as np
import torch

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, build, rms


@torch.no_grad()
def deviation(seed: int) -> float:
    """The largest relative error of 1 + α² · branches as the stream's variance, with all branches open."""
    model = build("nf", seed, dim=128)
    for name, parameter in model.named_parameters():
        if name.endswith("skip_gain"):
            parameter.fill_(1.0)
    variance = rms(model)[..., 2].flatten() ** 2
    predicted = 1 + 0.2**2 * np.arange(1, len(variance) + 1)
    return float(np.abs(variance / predicted - 1).max())


def measure() -> list[Check]:
    return [Check("error of the predicted variance", [deviation(seed) for seed in SEEDS], below=0.15, against=0.5)]


CLAIM = Claim(
    {"schemes": ("nf",), "weight_norms": ("scaled_weight_standardization",)},
    "Brock et al. 2021, arXiv:2101.08692",
    "With scaled weight standardization each branch adds α² to the stream's variance, as the design assumes",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("nf_variance")
