"""Filling a model: every value depends on (seed, name) only, never on the order or the place of the others."""

from hashlib import blake2b
from itertools import chain

import torch
from torch import Tensor

from nlm.model import Transformer, weights


@torch.no_grad()
def init(model: Transformer, seed: int) -> Transformer:
    """Fills every parameter and buffer in place, in the scheme's way, and projects what the scheme projects.

    Tensors that start at a constant or a table come from their module's `initial`; every other one is a matrix
    and is drawn from N(0, scheme.std²).
    """
    drawn = {name: weight for name, _, weight in weights(model)}
    for prefix, module in model.named_modules():
        initial = getattr(module, "initial", {})
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for name, tensor in own:
            full_name = f"{prefix}.{name}" if prefix else name
            value = initial.get(name)
            if value is None:
                _draw(tensor, model.scheme.std(drawn[full_name]), seed, full_name)
            elif callable(value):
                tensor.copy_(value())
            else:
                tensor.fill_(value)
    for parameter, axis in projected(model):
        to_unit(parameter, axis)
    return model


def projected(model: Transformer) -> list[tuple[torch.nn.Parameter, int]]:
    """The parameters that the scheme keeps at unit norm, each with its axis."""
    axes = ((parameter, model.scheme.unit_axis(weight)) for _, parameter, weight in weights(model))
    return [(parameter, axis) for parameter, axis in axes if axis is not None]


def to_unit(matrix: Tensor, axis: int) -> None:
    """[out in], in place: every slice along `axis` gets norm 1."""
    matrix.div_(matrix.norm(dim=axis, keepdim=True))


def _draw(tensor: Tensor, std: float, seed: int, name: str) -> None:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
