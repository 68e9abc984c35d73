"""Near the output, Pre-LN's gradients fall with depth and Post-LN's do not."""

from typing import Any

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import exponents, signal

DEPTHS = [4, 8, 16, 32, 64]


def powers(scheme: str, **fields: Any) -> list[float]:
    """Of depth, of the last layer's gradient norm at initialization."""
    table = {"name": scheme} | fields
    return exponents(DEPTHS, lambda seed, n: float(signal(scheme, seed, scheme=table, n_layers=n).grad_norm[-1]))


def measure() -> list[Check]:
    return [
        Check("power of depth of Pre-LN's", powers("pre_ln", residual_init=False), below=-0.25),
        Check("of Post-LN's", powers("post_ln"), above=-0.25),
    ]


CLAIM = Claim(
    {"schemes": ("pre_ln", "post_ln")},
    "Xiong et al. 2020, arXiv:2002.04745, theorem 1",
    "At initialization the last layer's gradient falls as depth^-1/2 under Pre-LN and does not under Post-LN",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("pre_ln_gradients")
