"""σReparam keeps attention's entropy from collapsing at a high learning rate."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, attention, config, entropy, less, train


def least(**model: str) -> list[float]:
    """Once a seed: the mean entropy of the layer where it is lowest, after training at a high rate."""

    def lowest(seed: int) -> float:
        engine = train(config("pre_ln", seed, {"n_layers": 6} | model, optim={"lr": 3e-2}))
        return min(float(entropy(p).mean()) for p in attention(engine.models[0]))

    return [lowest(seed) for seed in SEEDS]


def measure() -> list[Check]:
    return [less("lowest entropy", "plain weights", least(), "σReparam", least(weight_norm="spectral"))]


CLAIM = Claim(
    {"weight_norms": ("spectral",)},
    "Zhai et al. 2023, arXiv:2303.06296",
    "With each matrix over its largest singular value, times a learned number, attention's entropy does not collapse",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("spectral_entropy")
