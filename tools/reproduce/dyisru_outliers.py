"""What LayerNorm does to outliers is closer to DyISRU and ELN than to DyT."""

from collections.abc import Callable
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from nlm.norms import LayerNorm
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, rows, train

SHARPNESS = torch.logspace(-2, 2, 200)


def pairs(seed: int) -> list[tuple[Tensor, Tensor]]:
    """What goes into each LayerNorm of a trained model, and what comes out before the gain."""
    model, found = train(config("pre_ln", seed, {"n_layers": 6})).models[0], []
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(rows(1000 + seed)[:, :-1])
    return [(x.flatten(), F.layer_norm(x, x.shape[-1:]).flatten()) for x in found]


def error(curve: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Mean square on the 1 % of x farthest from 0, of height · curve(sharpness · x) fitted to all of them.

    Both numbers are fitted, as both kinds of layers have a sharpness and a gain that are learned.
    """

    def fitted(sharpness: Tensor) -> Tensor:
        z = curve(sharpness * x)
        return z * ((z * y).sum() / z.square().sum())

    best = min((fitted(s) for s in SHARPNESS), key=lambda z: float((z - y).square().mean()))
    far = x.abs() > x.abs().quantile(0.99)
    return float((best - y)[far].square().mean())


def isru(x: Tensor) -> Tensor:
    """DyISRU and ELN, which differ in height only."""
    return x * (1 + x.square()).rsqrt()


def measure() -> list[Check]:
    sites = [pairs(seed) for seed in SEEDS]
    of_isru, of_tanh = ([sum(error(curve, x, y) for x, y in each) for each in sites] for curve in (isru, torch.tanh))
    ratios = [log(a / b) for a, b in zip(of_isru, of_tanh, strict=True)]
    return [Check("ln error on outliers, DyISRU / DyT", ratios, below=0.0)]


CLAIM = Claim(
    {"norms": ("dyisru", "eln")},
    "Stollenwerk 2025, arXiv:2503.21708",
    "Fitted to what LayerNorm does in a trained model, DyISRU and ELN meet outliers better than DyT",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("dyisru_outliers")
