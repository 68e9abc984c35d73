"""A loss that is a sum over rows, and its gradients, some rows at a time: of the logits [tokens, vocabulary], by far
the largest tensor of a model, only those rows exist at any moment.

The gradients are made in the forward, while the logits are there (Hsu et al. 2024, Liger Kernel, arXiv:2410.10989,
section 3.2); all that the backward does is to scale them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Loss = Callable[[Tensor, Tensor], Tensor]
"""x [1 n D], targets [1 n] -> [], a sum over the n rows."""
LEAST_ROWS = 256
"""Fewer do not keep a matrix product busy."""


def default_rows(tokens: int, dim: int, vocab: int) -> int:
    """How many rows' logits take as much memory as the stream of all tokens."""
    return max(LEAST_ROWS, tokens * dim // vocab)


def sum_over_rows(loss: Loss, x: Tensor, targets: Tensor, parameters: Sequence[Tensor], rows: int) -> Tensor:
    """x [B S D], targets [B S] -> []: `loss` of `rows` rows at a time, summed. It reads all `parameters`, no others."""
    if targets.numel() <= rows:
        return loss(x, targets)
    x, targets = x.flatten(0, 1), targets.flatten()
    if torch.is_grad_enabled():
        return _SumOverRows.apply(loss, rows, targets, x, *parameters)  # type: ignore[no-any-return]
    parts = zip(x.split(rows), targets.split(rows), strict=True)
    return torch.stack([loss(some[None], theirs[None]) for some, theirs in parts]).sum()


class _SumOverRows(Function):
    @staticmethod
    def forward(ctx: Any, loss: Loss, rows: int, targets: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        x_needed, *needed = ctx.needs_input_grad[3:]
        learned = [parameter for parameter, is_needed in zip(parameters, needed, strict=True) if is_needed]
        losses, x_gradients, gradients = [], [], [torch.zeros_like(parameter) for parameter in learned]
        for some, theirs in zip(x.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                some = some.detach().requires_grad_()
                value = loss(some[None], theirs[None])
            x_gradient, *more = torch.autograd.grad(value, [some, *learned])
            losses.append(value.detach())
            x_gradients.append(x_gradient)
            torch._foreach_add_(gradients, more)
        found = iter(gradients)
        ctx.gradients = [torch.cat(x_gradients) if x_needed else None, *(next(found) if n else None for n in needed)]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, since the head's is as large as the head
        torch._foreach_mul_([g for g in gradients if g is not None], gradient)
        return None, None, None, *gradients
