"""Training makes Pre-LN's stream grow, and Peri-LN's less."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, build, config, less, rms, train


def growth(scheme: str) -> list[float]:
    """Once a seed: by which factor training at a high rate multiplies the variance of what leaves the last layer."""

    def factor(seed: int) -> float:
        trained = train(config(scheme, seed, optim={"lr": 1e-2})).models[0]
        return float(rms(trained)[-1, 1, 2] / rms(build(scheme, seed))[-1, 1, 2]) ** 2

    return [factor(seed) for seed in SEEDS]


def measure() -> list[Check]:
    return [less("growth of variance", "Peri-LN", growth("peri_ln"), "Pre-LN", growth("pre_ln"))]


CLAIM = Claim(
    {"schemes": ("peri_ln",)},
    "Kim et al. 2025, arXiv:2502.02732",
    "In training the stream's variance grows by orders of magnitude under Pre-LN, under Peri-LN it stays bounded",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("peri_ln_growth")
