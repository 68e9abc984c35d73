"""Sigmoid attention is as good as softmax."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, losses


def trained(score: str) -> list[float]:
    return losses("pre_ln", {"n_layers": 6, "attention": {"score": score}})


def measure() -> list[Check]:
    return [as_good("sigmoid", trained("sigmoid"), "softmax", trained("softmax"))]


CLAIM = Claim(
    {"scores": ("sigmoid",)},
    "Ramapuram et al. 2024, arXiv:2409.04431",
    "Sigmoid attention with a bias of -ln T matches softmax attention",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("sigmoid_loss")
