"""Without norms ReLU does better than GELU, with them GELU does."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses


def trained(scheme: str, activation: str, **fields: float) -> list[float]:
    model = {"n_layers": 8, "activation": activation, "scheme": {"name": scheme} | fields}
    return losses(scheme, model, train={"steps": 150}, optim={"lr": 1e-3, "warmup_steps": 8})


def measure() -> list[Check]:
    relu, gelu = (trained("norm_free", activation, init_std=0.1) for activation in ("relu", "gelu"))
    relu_ln, gelu_ln = (trained("pre_ln", activation) for activation in ("relu", "gelu"))
    return [
        less("loss without norms", "ReLU", relu, "GELU", gelu),
        less("loss with LayerNorm", "GELU", gelu_ln, "ReLU", relu_ln),
    ]


CLAIM = Claim(
    {"schemes": ("norm_free",)},
    "Jha & Reagen 2024, arXiv:2410.09637",
    "In a Transformer without norms ReLU does better than GELU, in one with LayerNorm it is the other way round",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("norm_free_relu")
