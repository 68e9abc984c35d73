"""DeepNorm's first update does not grow with depth."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import TESTS, exponents, signal

DEPTHS = [8, 16, 32, 64, 128]


def powers(scheme: str) -> list[float]:
    """Of depth, that one step of SGD moves the stream by."""
    return exponents(DEPTHS, lambda seed, n: float(signal(scheme, seed, n_layers=n, **TESTS).update["sgd"][-1]))


def measure() -> list[Check]:
    return [
        Check("power of depth of DeepNorm's update", [abs(x) for x in powers("deepnorm")], below=0.1, against=0.5),
        Check("of Post-LN's", powers("post_ln"), above=0.5, against=0.1),
    ]


CLAIM = Claim(
    {"schemes": ("deepnorm",)},
    "Wang et al. 2022, arXiv:2203.00555",
    "However deep the model, one step changes its output by no more than a constant; under Post-LN by ever more",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("deepnorm_update")
