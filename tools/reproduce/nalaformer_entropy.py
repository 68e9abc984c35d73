"""The longer a query, the sharper norm-aware linear attention."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, attention, build, entropy, less


def spread(factor: float) -> list[float]:
    """Once a seed: the mean entropy of attention when all queries are longer by a factor."""

    def mean(seed: int) -> float:
        model = build("pre_ln", seed, n_layers=4, attention={"score": "nalaformer"}, position="learned")
        for block in model.blocks.values():
            block.attn.wq.weight.data.mul_(factor)
        return sum(float(entropy(p).mean()) for p in attention(model)) / 4

    return [mean(seed) for seed in SEEDS]


def measure() -> list[Check]:
    return [less("entropy", "queries x 4", spread(4.0), "x ¼", spread(0.25))]


CLAIM = Claim(
    {"scores": ("nalaformer",)},
    "Meng et al. 2025, arXiv:2506.21137",
    "As under softmax, and other than in usual linear attention, the entropy falls as queries grow",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("nalaformer_entropy")
