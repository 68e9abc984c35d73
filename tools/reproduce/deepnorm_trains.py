"""DeepNorm trains where Post-LN does not."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import losses, trains

DEEP = {"n_layers": 24}


def measure() -> list[Check]:
    return [trains("DeepNorm", losses("deepnorm", DEEP)), trains("Post-LN", losses("post_ln", DEEP), fails=True)]


CLAIM = Claim(
    {"schemes": ("deepnorm", "post_ln")},
    "Wang et al. 2022, arXiv:2203.00555; Xiong et al. 2020, arXiv:2002.04745",
    "Without warmup a deep Post-LN model does not train, and a DeepNorm model does",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("deepnorm_trains")
