"""Training the weights: optimizers, gradient processing, learning-rate schedules, projection."""

from collections.abc import Callable

from nlm.config import OptimConfig
from nlm.optim.adafactor import Adafactor
from nlm.optim.adamp import SGDP, AdamP
from nlm.optim.adamw import AdamW, adamw
from nlm.optim.adamw_bf16 import AdamWBF16
from nlm.optim.base import Optimizer
from nlm.optim.clip import clip_gradients
from nlm.optim.continual import ContinualBackprop
from nlm.optim.lars import LAMB, LARS
from nlm.optim.lawn import LAWN
from nlm.optim.lion import Lion
from nlm.optim.muon import Muon
from nlm.optim.project import projection
from nlm.optim.ranger21 import Ranger21
from nlm.optim.running import RunningStatistics
from nlm.optim.schedule import learning_rate
from nlm.optim.weight_norm import WeightNormUpdate
from nlm.parallel.pieces import Pieces

__all__ = [
    "OPTIMIZERS",
    "ContinualBackprop",
    "RunningStatistics",
    "WeightNormUpdate",
    "adamw",
    "clip_gradients",
    "learning_rate",
    "make_optimizer",
    "projection",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adamw_bf16": AdamWBF16,
    "adamp": AdamP,
    "sgdp": SGDP,
    "ranger21": Ranger21,
    "lamb": LAMB,
    "lars": LARS,
    "muon": Muon,
    "lion": Lion,
    "adafactor": Adafactor,
    "lawn": LAWN,
}
"""Keyword-only arguments are the fields of [optim] that are an optimizer's own."""


def make_optimizer(
    pieces: Pieces, config: OptimConfig, kernels: str = "inductor", say: Callable[[str], None] | None = None
) -> Optimizer:
    """With `kernels`, a value of parallel.kernels, of which `say` hears where they went."""
    make = OPTIMIZERS[config.name]
    # Pieces that are offloaded lie elsewhere than where kernels run.
    chosen = kernels == "triton" and make is AdamW and pieces.tensors[0].device == pieces.mesh.device
    if chosen:
        from nlm.optim.adamw_triton import TritonAdamW  # Triton is imported only where it is chosen

        make = TritonAdamW
    optimizer = make(pieces, config, **config.fields)
    if chosen and say:
        say(
            f"kernels in the update: adamw of {len(pieces.held)} tensors, {len(optimizer.already_unit)} projected by it"
        )
    return optimizer
