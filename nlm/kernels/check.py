"""Before a kernel is used: does it compute what its reference does, on the shapes that it will meet?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nlm.kernels import residual, rotary, sphere

REFERENCES: dict[Any, Callable[..., Any]] = {
    torch.ops.nlm.residual.default: residual.reference,
    torch.ops.nlm.rotary.default: rotary.reference,
    torch.ops.nlm.sphere_step.default: sphere.reference,
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
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
    for what, dtype, difference in differences(kernel, device, *arguments):
        if not difference <= TOLERANCES[dtype]:
            raise RuntimeError(
                f"the kernel {kernel} does not compute what it should on {device}: {what} differs by {difference:.1e} "
                f"of its norm, where {TOLERANCES[dtype]:.0e} is expected of {dtype}, for {arguments}; "
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
