"""What the per-layer statistics are called, and how each is drawn: a vector's name is "quantity/part".

The part is a sublayer ("attn", "ffn"), a role of weights, "layer", or what a learned number is called.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Quantity:
    """A "log" scale is for sizes, "linear" for shares and cosines, "symmetric" for what may be of either sign."""

    title: str
    scale: Literal["log", "linear", "symmetric"] = "log"


def _moments(of: str, title: str, where: str = "") -> dict[str, Quantity]:
    """Over all elements of a tensor."""
    return {
        f"{of}_rms{where}": Quantity(f"RMS of {title}"),
        f"{of}_mean{where}": Quantity(f"mean of {title}", "symmetric"),
        f"{of}_variance{where}": Quantity(f"variance of {title}"),
        f"{of}_max{where}": Quantity(f"largest |x| of {title}"),
    }


QUANTITIES: dict[str, Quantity] = {
    **_moments("stream", "the stream before a sublayer", "_in"),
    **_moments("branch", "what a sublayer gives"),
    **_moments("stream", "the stream after a sublayer", "_out"),
    "stream_cosine": Quantity("cosine of the stream before and after a sublayer", "linear"),
    "attention_entropy": Quantity("entropy of attention, nats", "linear"),
    "attention_uniform": Quantity("entropy of attention, if it were uniform, nats", "linear"),
    "attention_saturated": Quantity("share of queries with a weight above 0.95", "linear"),
    "max_logit": Quantity("largest logit of attention", "symmetric"),
    "q_norm": Quantity("norm of the queries, RMS over positions and heads"),
    "k_norm": Quantity("norm of the keys, RMS over positions and heads"),
    "dead_units": Quantity("share of hidden units that are 0 everywhere", "linear"),
    "dormant_units": Quantity("share of hidden units whose activity is below 0.025 of the mean", "linear"),
    "stream_grad_rms": Quantity("RMS of the loss's gradient by the stream after a layer"),
    "grad_norm": Quantity("norm of the gradient"),
    "weight_norm": Quantity("norm of the weights"),
    "update_norm": Quantity("norm of the update"),
    "update_ratio": Quantity("norm of the update over that of the weights"),
    "weight_angle": Quantity("angle between the weights before and after the update, radians"),
    "learned": Quantity("mean |x| of gains, and of what the scheme and the score learn"),
    "gradient_signal": Quantity("square of the true gradient's norm, estimated", "symmetric"),
    "gradient_noise": Quantity("variance of the gradient of one row, estimated", "symmetric"),
    "effective_rank": Quantity("effective rank of the stream after a layer"),
    "largest_singular_value": Quantity("largest singular value of the weights"),
    "condition_number": Quantity("condition number of the weights"),
}
