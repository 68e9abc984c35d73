"""A learning rate that is too high costs less with normalized queries and keys."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses


def rise(score: str) -> list[float]:
    """Once a seed: by how much the loss is higher at ten times the usual rate."""
    model = {"n_layers": 6, "attention": {"score": score}}
    usual, hot = (losses("pre_ln", model, optim={"lr": lr}) for lr in (3e-3, 3e-2))
    return [y - x for x, y in zip(usual, hot, strict=True)]


def measure() -> list[Check]:
    return [less("rise of loss at 10 x lr", "QK-norm", rise("rms_qknorm_head"), "softmax", rise("softmax"))]


CLAIM = Claim(
    {"scores": ("rms_qknorm_head",)},
    "Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023, arXiv:2309.14322",
    "Normalizing queries and keys keeps attention stable at learning rates at which it is not without",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("rms_qknorm_rate")
