"""NormFormer's gradients are more even over depth than Pre-LN's."""

from math import log

from nlm.batch import Batch
from nlm.probe.measure import measure as probed
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, less, rows, train


def mismatch(scheme: str) -> list[float]:
    """Once a seed: |ln| of the mean gradient of the first quarter of the layers over that of the last, in training."""

    def ratio(seed: int) -> float:
        model = train(config(scheme, seed)).models[0].double()
        gradients = probed(model, Batch(rows(1000 + seed))).grad_norm
        quarter = len(gradients) // 4
        return float(gradients[:quarter].mean() / gradients[-quarter:].mean())

    return [abs(log(ratio(seed))) for seed in SEEDS]


def measure() -> list[Check]:
    return [less("|ln early / late gradients|", "NormFormer", mismatch("normformer"), "Pre-LN", mismatch("pre_ln"))]


CLAIM = Claim(
    {"schemes": ("normformer",)},
    "Shleifer et al. 2021, arXiv:2110.09456",
    "Pre-LN's gradients are much larger in early layers than in late ones; NormFormer evens them",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("normformer_gradients")
