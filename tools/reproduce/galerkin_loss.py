"""Softmax is not needed in attention."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, losses


def trained(score: str) -> list[float]:
    return losses("pre_ln", {"n_layers": 6, "attention": {"score": score}})


def measure() -> list[Check]:
    softmax = trained("softmax")
    return [
        as_good("Fourier", trained("fourier"), "softmax", softmax),
        as_good("Galerkin", trained("galerkin"), "softmax", softmax),
    ]


CLAIM = Claim(
    {"scores": ("fourier", "galerkin")},
    "Cao 2021, arXiv:2105.14995",
    "Attention without softmax, with a norm on what is multiplied, is as good",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("galerkin_loss")
