"""A product of many orthogonal matrices keeps all lengths, one of Gaussian matrices does not."""

from math import log

import torch

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, build


def condition(**init: str) -> list[float]:
    """Once a seed: ln of the condition number of the product of all layers' W_v."""

    def of(seed: int) -> float:
        blocks = build("pre_ln", seed, n_layers=32, **init).blocks.values()
        product = torch.linalg.multi_dot([block.attn.wv.weight.detach().double() for block in blocks])
        return log(float(torch.linalg.cond(product)))

    return [of(seed) for seed in SEEDS]


def measure() -> list[Check]:
    return [
        Check("ln condition number of 32 orthogonal matrices", condition(init="orthogonal"), below=1e-3),
        Check("of 32 as usual", condition(), above=log(1e3)),
    ]


CLAIM = Claim(
    {"inits": ("orthogonal",)},
    "Saxe et al. 2014, arXiv:1312.6120",
    "Orthogonal matrices make deep linear networks isometric at any depth; Gaussian ones collapse most directions",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("orthogonal_isometry")
