"""AdamP lets weights that a norm makes scale-invariant grow less than Adam."""

from nlm.anatomy import WRITES
from nlm.model import Transformer, weights
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, build, config, less, train

MODEL = {"n_layers": 6}


def growth(optimizer: str) -> list[float]:
    """Once a seed: the mean ‖W‖ after training over that before, of what Peri-LN normalizes: W_o and W_down."""

    def norms(model: Transformer) -> float:
        return sum(float(p.norm()) for _, p, w in weights(model) if w.role in WRITES)

    optim = {"name": optimizer, "betas": [0.9, 0.999], "weight_decay": 0.0}
    return [
        norms(train(config("peri_ln", seed, MODEL, optim=optim)).models[0]) / norms(build("peri_ln", seed, **MODEL))
        for seed in SEEDS
    ]


def measure() -> list[Check]:
    return [less("growth of ‖W‖", "AdamP", growth("adamp"), "Adam", growth("adamw"))]


CLAIM = Claim(
    {"optimizers": ("adamp",)},
    "Heo et al. 2021, arXiv:2006.08217",
    "Momentum lets the norms of scale-invariant weights grow too fast; AdamP takes the radial part out",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("adamp_norms")
