"""The activations of feed-forward sublayers, and ACTIVATIONS, the choice by name."""

from collections.abc import Callable
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from nlm.config import GATED

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
"""Of what W_up gives, or, of the gated ones, of what W_gate gives, before the two are multiplied."""


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Between -cap and cap, and about x where that is small beside it (Gemma 2, 2024, section 2)."""
    return cap * (x / cap).tanh()


def unit_variance_gain(activation: str) -> float:
    """What makes the hidden units' variance 1 when what the activation reads is N(0, 1) (Brock et al. 2021, section 3).

    Of act(g) · u with independent g and u the mean is 0 and the variance E[act(g)²].
    """
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64, device="cpu")
    density = (-x.square() / 2).exp() / (2 * pi) ** 0.5
    y = ACTIVATIONS[activation](x)
    mean = 0.0 if activation in GATED else torch.trapezoid(y * density, x)
    return float((torch.trapezoid(y.square() * density, x) - mean**2) ** -0.5)
