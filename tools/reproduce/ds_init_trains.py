"""DS-Init makes deep Post-LN trainable."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import best, lowest, trains

DEEP = {"n_layers": 12}
RATES = (1e-3, 3e-3)


def tuned(**init: str) -> list[float]:
    found = best(RATES, "post_ln", DEEP | init, optim={"warmup_steps": 30})
    return found[lowest(found)]


def measure() -> list[Check]:
    return [trains("Post-LN + DS-Init", tuned(init="ds_init")), trains("Post-LN", tuned(), fails=True)]


CLAIM = Claim(
    {"inits": ("ds_init",)},
    "Zhang et al. 2019, arXiv:1908.11365",
    "Weights that start smaller in deeper layers make deep Post-LN models train which do not otherwise",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("ds_init_trains")
