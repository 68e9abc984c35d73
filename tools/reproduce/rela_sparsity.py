"""ReLA's weights are mostly zero, and some rows all of them."""

import torch
from torch import Tensor

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, rows, train


def zeros(seed: int) -> tuple[float, float]:
    """The share of the weights that are 0, of those that could be others, and of the rows that have no others."""
    model, found = train(config("pre_ln", seed, {"n_layers": 6, "attention": {"score": "rela"}})).models[0], []

    def record(scores: Tensor, visible: Tensor) -> Tensor:
        found.append((scores <= 0)[..., visible])
        nulls.append((scores.relu() * visible).sum(-1) == 0)
        return scores.relu() * visible

    nulls: list[Tensor] = []
    for block in model.blocks.values():
        block.attn.score.weigh = record
    with torch.no_grad():
        model(rows(1000 + seed)[:, :-1])
    return float(torch.stack(found).float().mean()), float(torch.stack(nulls).float().mean())


def measure() -> list[Check]:
    weights, nulls = zip(*map(zeros, SEEDS), strict=True)
    return [Check("share of zero weights", weights, above=0.5), Check("of null rows", nulls, above=0.0)]


CLAIM = Claim(
    {"scores": ("rela",)},
    "Zhang et al. 2021, arXiv:2104.07012",
    "Rectified attention is sparse by itself: most weights are 0, and some heads attend to nothing at some positions",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("rela_sparsity")
