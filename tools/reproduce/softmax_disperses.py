"""The longer the context, the less of softmax's weight is on its few largest."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, attention, config, less, train

MODEL = {"n_layers": 4}
LONG = {"seq_len": 256, "batch_tokens": 512}


def shares(seed: int) -> tuple[float, float]:
    """Of the four largest weights together, at the 16th position and at the last."""
    weights = attention(train(config("pre_ln", seed, MODEL, train=LONG)).models[0], seed=1000, **LONG)
    short, long = (sum(float(p[:, at].topk(4).values.sum(-1).mean()) for p in weights) for at in (15, -1))
    return short / len(weights), long / len(weights)


def measure() -> list[Check]:
    short, long = zip(*map(shares, SEEDS), strict=True)
    return [less("share of the four largest", "256 keys", long, "16 keys", short, by=0.1)]


CLAIM = Claim(
    {"scores": ("softmax",)},
    "Mudarisov et al. 2025, arXiv:2508.17821; Veličković et al. 2024, arXiv:2410.01104",
    "As the number of keys grows, softmax's weights spread out, and no few keys can be told from the rest",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("softmax_disperses")
