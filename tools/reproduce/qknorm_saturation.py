"""At a high learning rate, attention saturates less with QKNorm."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, attention, config, less, train


def saturated(score: str) -> list[float]:
    """Once a seed: the share of positions, the first left out, that give one key more than 0.95."""

    def share(seed: int) -> float:
        engine = train(config("pre_ln", seed, {"n_layers": 6, "attention": {"score": score}}, optim={"lr": 1e-2}))
        return sum(float((p[:, 1:].amax(-1) > 0.95).float().mean()) for p in attention(engine.models[0])) / 6

    return [share(seed) for seed in SEEDS]


def measure() -> list[Check]:
    return [less("share of saturated rows", "QKNorm", saturated("qknorm"), "softmax", saturated("softmax"))]


CLAIM = Claim(
    {"scores": ("qknorm",)},
    "Henry et al. 2020, arXiv:2010.04245",
    "With queries and keys of unit length softmax is less prone to saturate",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("qknorm_saturation")
