"""LayerScale makes deep Pre-LN models converge faster."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import less, losses

DEEP = {"n_layers": 24}


def measure() -> list[Check]:
    plain = losses("pre_ln", DEEP | {"scheme": {"name": "pre_ln", "residual_init": False}})
    return [less("loss", "LayerScale", losses("layerscale", DEEP), "Pre-LN", plain)]


CLAIM = Claim(
    {"schemes": ("layerscale",)},
    "Touvron et al. 2021, arXiv:2103.17239",
    "Small learned gains on the channels of each branch make deep Pre-LN models easier to train",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("layerscale_trains")
