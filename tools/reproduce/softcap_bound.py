"""Capped logits are bounded, however large the weights."""

import torch

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, attention, build

CAP = 5.0


@torch.no_grad()
def ratio(score: dict[str, object]) -> list[float]:
    """Once a seed: the largest ln of a weight over another of the same query, with W_q a hundred times as large."""

    def largest(seed: int) -> float:
        model = build("pre_ln", seed, n_layers=1, attention=score)
        model.blocks["0"].attn.wq.weight *= 100
        (weights,) = attention(model, seed)
        last = weights[:, -1].double().clamp(min=1e-30).log()  # [B H S], of the position that sees all
        return float((last.amax(-1) - last.amin(-1)).max())

    return [largest(seed) for seed in SEEDS]


def measure() -> list[Check]:
    return [
        Check("ln ratio of weights, cap 5", ratio({"score": "softcap", "cap": CAP}), below=2 * CAP + 1e-3),
        Check("of softmax", ratio({"score": "softmax"}), above=2 * CAP),
    ]


CLAIM = Claim(
    {"scores": ("softcap",)},
    "Gemma team 2024, arXiv:2408.00118, section 2",
    "A soft cap keeps the logits of attention within ± cap, and so the ratio of its weights within e^(2 cap)",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("softcap_bound")
