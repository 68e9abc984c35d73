"""Under µP the first update of Adam does not depend on width."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import exponents, signal

WIDTHS = [32, 64, 128, 256]


def updates(**init: str) -> list[float]:
    """The power of width by which one step by the gradient's sign moves the stream; heads grow in number."""

    def update(seed: int, dim: int) -> float:
        return float(signal("pre_ln", seed, dim=dim, n_heads=dim // 16, n_layers=4, **init).update["sign"][-1])

    return exponents(WIDTHS, update)


def measure() -> list[Check]:
    return [
        Check("power of width of the update with µP", [abs(x) for x in updates(init="mup")], below=0.2, against=0.5),
        Check("with the usual init", updates(), above=0.5),
    ]


CLAIM = Claim(
    {"inits": ("mup",)},
    "Yang et al. 2022, arXiv:2203.03466, table 3",
    "Under µP wide and narrow models are changed equally by a step, and share their best learning rate",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("mup_width")
