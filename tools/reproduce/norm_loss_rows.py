"""Norm loss brings the rows of matrices to norm 1."""

from typing import Any

import torch

from nlm.anatomy import MATRICES
from nlm.model import weights
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, less, train


def distance(**model: Any) -> list[float]:
    """Once a seed: the mean of |1 - ‖row‖| over the matrices of a trained model."""

    def mean(seed: int) -> float:
        trained = train(config("peri_ln", seed, {"n_layers": 4} | model)).models[0]
        rows = [p.detach().norm(dim=1) for _, p, w in weights(trained) if w.site and w.role in MATRICES]
        return float((torch.cat(rows) - 1).abs().mean())

    return [mean(seed) for seed in SEEDS]


def measure() -> list[Check]:
    pulled = distance(weight_norm={"name": "norm_loss", "strength": 3.0})
    return [less("|1 - norm of rows|", "norm loss", pulled, "weight decay", distance())]


CLAIM = Claim(
    {"weight_norms": ("norm_loss",)},
    "Georgiou et al. 2021, arXiv:2103.06583",
    "A penalty on (1 - ‖row‖)² in the place of weight decay keeps the rows at norm 1 while the network learns",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("norm_loss_rows")
