"""With 1/sqrt(2L) on the branches and depth-µP, size of stream and first update do not depend on depth."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import TESTS, exponents, signal

DEPTHS = [4, 8, 16, 32, 64]
WIDE = TESTS | {"dim": 128, "n_heads": 8}
"""What is claimed is of infinite width: narrow models stray from it."""


def updates(scheme: str) -> list[float]:
    """The power of depth by which one step of Adam, which goes by the gradient's sign, moves the stream."""
    return exponents(DEPTHS, lambda seed, n: float(signal(scheme, seed, n_layers=n, **WIDE).update["sign"][-1]))


def measure() -> list[Check]:
    size = exponents(DEPTHS, lambda seed, n: float(signal("branch_scaled", seed, n_layers=n, **WIDE).rms[-1, 1, 2]))
    update, usual = updates("branch_scaled"), updates("pre_ln")
    return [
        Check("power of depth of the stream's RMS", [abs(x) for x in size], below=0.1, against=0.3),
        Check("of the first update by sign", [abs(x) for x in update], below=0.15, against=0.4),
        Check("of Pre-LN's", usual, above=0.3, against=0.15),
    ]


CLAIM = Claim(
    {"schemes": ("branch_scaled",)},
    "Hayou & Yang 2023, arXiv:2302.00453; Yang et al. 2023, arXiv:2310.02244, table 1",
    "Branches times 1/sqrt(depth) keep the stream's size, and with a rate that falls likewise the first update of Adam",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("branch_scaled_update")
