"""Before a kernel is used: does it compute what its reference does, on the shapes that it will meet?"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from nlm.kernels import adamw, residual, rotary, sphere

REFERENCES: dict[Any, Callable[..., Any]] = {
    torch.ops.nlm.residual.default: residual.reference,
    torch.ops.nlm.rotary.default: rotary.reference,
    torch.ops.nlm.sphere_step.default: sphere.reference,
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""By what a value's difference may be, as a share of the value, both as norms over the whole tensor."""


@dataclass(frozen=True)
class Like:
    """What stands for a tensor among a kernel's arguments."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    learned: bool = True


@cache
def check(kernel: Any, device: torch.device, *arguments: Any) -> None:
    """Errors: RuntimeError with what differs, and by how much."""
    _judge(kernel, device, arguments, differences(kernel, device, *arguments))


def check_adamw(weights: Sequence[Tensor], axes: Sequence[int | None], betas: tuple[float, float], eps: float) -> None:
    """As `check`, on the shapes of these weights, of whose slices a few are enough."""
    shapes = dict.fromkeys(_few(tuple(w.shape), axis) for w, axis in zip(weights, axes, strict=True) if w.numel())
    device, dtype = weights[0].device, weights[0].dtype
    _judge("adamw", device, tuple(shapes), adamw_differences(list(shapes), device, dtype, betas, eps))


def _few(shape: tuple[int, ...], axis: int | None) -> tuple[tuple[int, ...], int | None]:
    """Two whole tiles' worth of slices, and as many more as are left in the last tile."""
    rows, columns = (1, prod(shape)) if axis is None else shape
    tile = adamw.tile_of((rows, columns), axis or 0)
    if axis == 1:
        return (min(rows, 2 * tile[0] + rows % tile[0]), columns), axis
    columns = min(columns, 2 * tile[1] + columns % tile[1])
    return (columns,) if axis is None else (rows, columns), axis


def _judge(kernel: Any, device: torch.device, of: Any, found: Iterable[tuple[str, torch.dtype, float]]) -> None:
    for what, dtype, difference in found:
        if not difference <= TOLERANCES[dtype]:
            raise RuntimeError(
                f"the kernel {kernel} does not compute what it should on {device}: {what} differs by {difference:.1e} "
                f"of its norm, where {TOLERANCES[dtype]:.0e} is expected of {dtype}, for {of}; "
                'set parallel.kernels = "inductor"'
            )


def differences(kernel: Any, device: torch.device, *arguments: Any) -> Iterator[tuple[str, torch.dtype, float]]:
    """Of values and gradients, for standard normal numbers, from those that the reference has in float64 of the same
    numbers -> what it is of, its dtype, the difference as a share of the norm."""
    generator = torch.Generator().manual_seed(0)

    def normal(like: Like) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(device, like.dtype)

    given = [normal(a) if isinstance(a, Like) else a for a in arguments]
    exact = [a.double() if isinstance(a, Tensor) else torch.float64 if isinstance(a, torch.dtype) else a for a in given]
    learned = [i for i, a in enumerate(arguments) if isinstance(a, Like) and a.learned]

    def run(function: Callable[..., Any], values: list[Any], cotangents: list[Tensor]) -> list[Tensor]:
        leaves = [values[i].requires_grad_() for i in learned]
        found = function(*values)
        outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y.numel()]
        cotangents.extend(normal(Like(y.shape, y.dtype)) for y in outputs[len(cotangents) :])
        gradients = torch.autograd.grad(
            outputs, leaves, [g.to(y.dtype) for g, y in zip(cotangents, outputs, strict=True)]
        )
        return [*outputs, *gradients]

    cotangents: list[Tensor] = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        ours, theirs = run(kernel, given, cotangents), run(REFERENCES[kernel], exact, cotangents)
    names = [f"output {i}" for i in range(len(cotangents))] + [f"the gradient of argument {i}" for i in learned]
    for name, mine, other in zip(names, ours, theirs, strict=True):
        yield name, mine.dtype, float((mine.double() - other).norm() / other.norm())


def adamw_differences(
    shapes: Sequence[tuple[tuple[int, ...], int | None]],
    device: torch.device,
    dtype: torch.dtype,
    betas: tuple[float, float],
    eps: float,
) -> Iterator[tuple[str, torch.dtype, float]]:
    """As `differences`, of an update of tensors of these shapes, projected along their axes. A norm counts as at least
    1, since a number alone may become small."""
    generator = torch.Generator().manual_seed(0)
    given = [[torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)] for shape, _ in shapes]
    for of in given:
        of[3].square_()
    axes = [axis for _, axis in shapes]
    rates, decays = torch.rand(2, len(shapes), generator=generator, dtype=torch.float64).to(device)
    t = torch.full((), 3.0, dtype=torch.float64, device=device)
    exact = [
        adamw.reference(w.double(), g.double(), m.double(), v.double(), rate, decay, t, betas, eps, axis)
        for (w, g, m, v), rate, decay, axis in zip(given, rates.tolist(), decays.tolist(), axes, strict=True)
    ]
    weights, gradients, ms, vs = zip(*given, strict=True)
    left_out = torch.zeros_like(t, dtype=torch.bool)
    adamw.update(adamw.table(weights, ms, vs, axes), gradients, rates, decays, t, betas, eps, left_out)
    for i, (w, _, m, v) in enumerate(given):
        for name, mine, other in zip(("weight", "exp_avg", "exp_avg_sq"), (w, m, v), exact[i], strict=True):
            yield f"{name} {i}", dtype, float((mine.double() - other).norm() / other.norm().clamp(min=1))
