"""Under weight normalization gradients are orthogonal to weights, so that SGD lets these grow."""

from torch.nn.functional import cross_entropy

from nlm.anatomy import MATRICES
from nlm.model import weights
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, build, rows


def step(seed: int, lr: float = 0.1) -> tuple[float, float]:
    """The largest |cos| between a row and its gradient, and the least growth of a matrix's norm by a step of SGD."""
    model, tokens = build("pre_ln", seed, weight_norm="weight_norm").double(), rows(seed)
    cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    cosines, growths = [], []
    for _, parameter, weight in weights(model):
        if weight.site and weight.role in MATRICES:
            w, g = parameter.detach(), parameter.grad
            assert g is not None
            cosines.append(float(((w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))).abs().max()))
            growths.append(float((w - lr * g).norm() / w.norm()) - 1)
    return max(cosines), min(growths)


def measure() -> list[Check]:
    cosines, growths = zip(*map(step, SEEDS), strict=True)
    return [
        Check("|cos| of row and gradient", cosines, below=1e-6),
        Check("least growth by a step", [min(growths)], above=0.0),
    ]


CLAIM = Claim(
    {"weight_norms": ("weight_norm",)},
    "Salimans & Kingma 2016, arXiv:1602.07868, section 2",
    "Gradients are orthogonal to the weights that are normalized, which therefore grow with every step of SGD",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("weight_norm_orthogonal")
