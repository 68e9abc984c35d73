"""Rows of unit norm condition a trained matrix better."""

import numpy as np

from nlm.anatomy import MATRICES
from nlm.model import weights
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, train


def gain(seed: int) -> float:
    """The mean over trained matrices of ln of the condition number with rows of unit norm over that without."""
    found = []
    for _, parameter, weight in weights(train(config("pre_ln", seed, {"n_layers": 6})).models[0]):
        if weight.site and weight.role in MATRICES:
            matrix = parameter.detach().numpy()
            unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
            found.append(np.log(np.linalg.cond(unit) / np.linalg.cond(matrix)))
    return float(np.mean(found))


def measure() -> list[Check]:
    return [Check("ln condition number, unit rows / as trained", [gain(seed) for seed in SEEDS], below=0.0)]


CLAIM = Claim(
    {"weight_norms": ("weight_conditioning",)},
    "Saratchandran et al. 2024, abstract; van der Sluis 1969",
    "Dividing rows by their norms brings the condition number of a network's matrices down",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("conditioning_number")
