"""Attention to the eight largest logits only is as good as to all."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, losses


def trained(score: dict[str, object]) -> list[float]:
    return losses("pre_ln", {"n_layers": 6, "attention": score})


def measure() -> list[Check]:
    return [as_good("top 8 of 32", trained({"score": "top_k", "k": 8}), "softmax", trained({"score": "softmax"}))]


CLAIM = Claim(
    {"scores": ("top_k",)},
    "Zhao et al. 2019, arXiv:1912.11637",
    "Softmax over the largest logits only loses nothing: what it leaves out is irrelevant",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("top_k_loss")
