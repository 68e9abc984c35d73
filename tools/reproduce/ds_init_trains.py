"""DS-Init makes deep Post-LN trainable."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import losses, trains

DEEP = {"n_layers": 12}
SLOW = {"lr": 1e-3, "warmup_steps": 30}


def measure() -> list[Check]:
    scaled = losses("post_ln", DEEP | {"init": "ds_init"}, optim=SLOW)
    return [trains("Post-LN + DS-Init", scaled), trains("Post-LN", losses("post_ln", DEEP, optim=SLOW), fails=True)]


CLAIM = Claim(
    {"inits": ("ds_init",)},
    "Zhang et al. 2019, arXiv:1908.11365",
    "Weights that start smaller in deeper layers make deep Post-LN models train which do not otherwise",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("ds_init_trains")
