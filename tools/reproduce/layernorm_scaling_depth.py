"""With LayerNorm scaling, deep layers do more than with Pre-LN."""

import torch
from torch import Tensor, nn

from nlm.parallel.engine import Engine
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, config, less, train, validation_loss


def without(engine: Engine, layer: int) -> float:
    """Validation loss when one layer passes the stream on as it is."""
    model = engine.models[0]
    left_out, call = model.blocks[str(layer)], model.call_block

    def call_others(block: nn.Module, x: Tensor, *args: object) -> tuple[Tensor, Tensor | None]:
        return (x, None) if block is left_out else call(block, x, *args)

    model.call_block = call_others
    loss = validation_loss(engine)
    model.call_block = call
    return loss


@torch.no_grad()
def worth(engine: Engine) -> float:
    """By how many nats the loss rises without a layer of the deeper half, on average."""
    layers = range(engine.models[0].n_layers // 2, engine.models[0].n_layers)
    return sum(without(engine, layer) for layer in layers) / len(layers) - validation_loss(engine)


def measure() -> list[Check]:
    plain, scaled = ([worth(train(config(s, seed))) for seed in SEEDS] for s in ("pre_ln", "layernorm_scaling"))
    return [less("loss that a deep layer saves", "Pre-LN", plain, "LayerNorm scaling", scaled)]


CLAIM = Claim(
    {"schemes": ("layernorm_scaling",)},
    "Sun et al. 2025, arXiv:2502.05795",
    "Deep layers of Pre-LN can be left out at little loss; with LayerNorm scaling they contribute more",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("layernorm_scaling_depth")
