"""Layer-sequential unit variance: what each matrix is to be multiplied by, one layer in memory at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlm.anatomy import Weight
from nlm.init import init
from nlm.model import Linear, Part, Transformer, held


@torch.no_grad()
def unit_variance_scales(
    make: Callable[[Part], Transformer], target: Callable[[Weight], float], tokens: Tensor, seed: int
) -> dict[str, float]:
    """Name -> factor of every matrix of the blocks, with which what it gives for tokens [B S] has the std of `target`.

    `make` designs a part of the whole model, without tensor parallelism: every rank computes all, and the same, in
    float64, so that the result depends on no layout.
    """
    scales: dict[str, float] = {}

    def scale(name: str, weight: Weight) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def before(linear: nn.Module, inputs: tuple[Tensor]) -> None:
            assert isinstance(linear, Linear)
            scales[name] = target(weight) / float(F.linear(inputs[0], linear.weight).std(correction=0))
            linear.weight.mul_(scales[name])

        return before

    def part(layers: range, first: bool) -> Transformer:
        return init(make(Part(layers, first, last=False)).double().to_empty(device="cpu"), seed)

    first = part(range(0), first=True)
    x = first(tokens)
    for layer in range(first.n_layers):
        block = part(range(layer, layer + 1), first=False)
        modules = dict(block.named_modules())
        for h in held(block):
            linear = modules[h.name.rpartition(".")[0]]
            if isinstance(linear, Linear) and h.parameter is linear.weight:
                linear.register_forward_pre_hook(scale(h.name, h.weight))
        x = block(x)
    return scales
