"""Cosine attention does not see how long queries are."""

import torch

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, attention, build


@torch.no_grad()
def change(score: str) -> list[float]:
    """Once a seed: the largest change of a weight of attention when W_q is ten times as large, layers' mean."""

    def largest(seed: int) -> float:
        model = build("pre_ln", seed, n_layers=1, attention={"score": score})
        (before,) = attention(model, seed)
        model.blocks["0"].attn.wq.weight *= 10
        (after,) = attention(model, seed)
        return float((after - before).abs().max())

    return [largest(seed) for seed in SEEDS]


def measure() -> list[Check]:
    return [
        Check("change of cosine attention by 10 W_q", change("cosine"), below=1e-4),
        Check("of softmax", change("softmax"), above=0.1),
    ]


CLAIM = Claim(
    {"scores": ("cosine",)},
    "Liu et al. 2021, arXiv:2111.09883, section 3.2",
    "With the cosine as score, attention does not follow the amplitude of activations",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("cosine_amplitude")
