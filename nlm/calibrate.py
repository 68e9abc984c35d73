"""Initial values that depend on what a module reads: found on random tokens, one layer in memory at a time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import Weight
from nlm.init import init
from nlm.model import Linear, Part, Transformer, held


@torch.no_grad()
def calibrated(
    make: Callable[[Part], Transformer],
    tokens: Tensor,
    seed: int,
    target: Callable[[Weight], float] | None,
    source: Tensor | None = None,
) -> dict[str, float | Tensor]:
    """By name, the values of what norms calibrate, numbers or vectors [D], and, with a `target`, what the matrices of
    the blocks are to be multiplied by so that what they give for tokens [B S], with an encoder also a source [B T], has
    that std. Each sees what those before it have become.

    `make` designs a part of the whole model, without tensor parallelism: every rank computes all, and the same, in
    float64, so that the result depends on no layout.
    """
    found: dict[str, float | Tensor] = {}

    def part(layers: range, first: bool = False, last: bool = False) -> Transformer:
        model = init(make(Part(layers, first, last)).double().to_empty(device="cpu"), seed)
        weights = {h.name: h.weight for h in held(model)}
        for prefix, module in model.named_modules():
            if hasattr(module, "calibrated"):
                module.register_forward_pre_hook(settle(prefix))
            elif target and isinstance(module, Linear) and (weight := weights[f"{prefix}.weight"]).site:
                module.register_forward_pre_hook(scale(f"{prefix}.weight", target(weight)))
        return model

    def settle(prefix: str) -> Callable[[Any, tuple[Tensor]], None]:
        def before(module: Any, inputs: tuple[Tensor]) -> None:
            for name, value in module.calibrated(inputs[0]).items():
                getattr(module, name).copy_(torch.as_tensor(value))
                found[f"{prefix}.{name}"] = value

        return before

    def scale(name: str, std: float) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def before(linear: nn.Module, inputs: tuple[Tensor]) -> None:
            assert isinstance(linear, Linear)
            found[name] = factor = std / float(F.linear(inputs[0], linear.weight).std(correction=0))
            linear.weight.mul_(factor)

        return before

    first = part(range(0), first=True)
    x, n_layers = first(tokens, source), first.config.n_all_layers
    for layer in range(n_layers):
        x = part(range(layer, layer + 1))(x, source)
    last = part(range(n_layers, n_layers), last=True)
    if last.final is not None:
        last.final(x[:, : tokens.shape[1]])
    return found
