"""OLMo 2's gradients spike less than Pre-LN's."""

from typing import Any

import torch

from nlm.build import build_engine
from nlm.data.rank import RankData
from nlm.mesh import Mesh
from nlm.optim import learning_rate
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, less

MODEL = {"norm": "rmsnorm", "norm_eps": 1e-6}
HOT = {"lr": 1e-2, "schedule": "constant"}


def spike(scheme: str, **model: Any) -> list[float]:
    """Once a seed: the largest gradient norm of the second half of a hot training, over the median."""

    def worst(seed: int) -> float:
        own = config(scheme, seed, MODEL | model, optim=HOT)
        engine, data, norms = build_engine(own, Mesh()), RankData(own, Mesh()), []
        for step in range(1, own.train.steps + 1):
            engine.forward_backward(data.rows(step))
            norms.append(engine.clip()[0])
            engine.update(learning_rate(own.optim, step, own.train.steps))
        late = torch.stack(norms)[len(norms) // 2 :]
        return float(late.max() / late.median())

    return [worst(seed) for seed in SEEDS]


def measure() -> list[Check]:
    olmo2 = spike("olmo2", attention={"score": "rms_qknorm_full"})
    return [less("largest / median gradient norm", "OLMo 2", olmo2, "Pre-LN", spike("pre_ln"))]


CLAIM = Claim(
    {"schemes": ("olmo2",), "scores": ("rms_qknorm_full",)},
    "OLMo team 2025, arXiv:2501.00656",
    "Normalizing what sublayers write, and queries and keys, makes for fewer spikes of the gradient norm than Pre-LN",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("olmo2_spikes")
