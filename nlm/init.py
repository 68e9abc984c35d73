"""Filling a model: every value depends on (seed, name) only, never on the order or the place of the others."""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from nlm.anatomy import Weight
from nlm.model import Transformer, held
from nlm.random import hashed
from nlm.weight_norms import WeightNorm


@torch.no_grad()
def init(model: Transformer, seed: int, calibrated: Mapping[str, float | Tensor] = MappingProxyType({})) -> Transformer:
    """Fills what this rank holds of every parameter and buffer, in the scheme's way, projected where it projects.

    Tensors that start at a constant or a table come from their module's `initial`, those of a weight norm perhaps from
    the matrix that it belongs to; every other one is a matrix, which the scheme makes of normal numbers. `calibrated`
    has values in the place of constants, and what matrices are multiplied by.
    """
    parameters = {h.name: h for h in held(model)}

    @lru_cache(maxsize=1)  # what stands beside a matrix may want it again
    def drawn(name: str) -> Tensor:
        return _drawn(name, parameters[name].weight, model, seed) * calibrated.get(name, 1.0)

    for prefix, module in model.named_modules():
        initial = getattr(module, "initial", {})
        matrix = f"{prefix.rpartition('.')[0]}.weight"  # that a weight norm belongs to
        for name, buffer in module.named_buffers(recurse=False):
            value = calibrated.get(f"{prefix}.{name}", initial[name])
            if callable(value):
                value = value(drawn(matrix)) if isinstance(module, WeightNorm) else value()
            value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
            if value.dim() and name in getattr(module, "spans", {}):
                (span,) = module.spans[name]
                value = value[span.start : span.stop]
            buffer.copy_(value)
        for name, _ in module.named_parameters(recurse=False):
            h = parameters[f"{prefix}.{name}" if prefix else name]
            value = initial.get(name)
            if value is None:
                h.tensor.copy_(h.part_of(drawn(h.name)))
            elif callable(value):
                h.tensor.copy_(h.part_of(value(drawn(matrix))))
            else:
                h.tensor.fill_(calibrated.get(h.name, value))
    return model


def to_unit(matrix: Tensor, axis: int, left_out: Tensor | None = None) -> None:
    """[out in], in place: every slice along `axis` gets norm 1; where `left_out` [] is true, nothing changes."""
    norms = matrix.norm(dim=axis, keepdim=True)
    matrix.div_(norms if left_out is None else norms.where(~left_out, 1))


def _drawn(name: str, weight: Weight, model: Transformer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(hashed(f"{seed}:{name}"))
    matrix = model.scheme.matrix(torch.randn(weight.shape, generator=generator), weight)
    if (axis := model.scheme.unit_axis(weight)) is not None:
        to_unit(matrix, axis)
    return matrix
