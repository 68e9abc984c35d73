"""Weight gradients put off: the backward gives each matrix's input gradient at once and its own when asked.

Zero-bubble schedules fill a pipeline's idle moments with the weight gradients (Qi et al. 2023, arXiv:2401.10241).
The general way of splitting a backward walks its graph, at a cost that grows faster than its depth; matrices, which
make up all but a sliver of it, can simply keep their two factors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from nlm.model import Linear

Factors = tuple[nn.Parameter, Tensor, Tensor]
"""weight [out in], inputs [… in], gradient of the outputs [… out]."""


class DeferredGradients:
    """Takes over the products of a model's linear layers, but for those with a weight norm, whose factor is no
    parameter, and queues their weight gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.queue: list[Factors] = []
        for module in model.modules():
            if isinstance(module, Linear) and module.weight_norm is None:
                module.multiply = self.multiply

    def multiply(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        """As F.linear, autocast included."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, weight, self.queue)
        return y if bias is None else y + bias.to(y.dtype)

    def take(self) -> Callable[[], None]:
        """What computes the gradients that the last backward has left, and adds them to their weights'."""
        factors, self.queue[:] = list(self.queue), []
        return partial(_accumulate, factors)


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, queue: list[Factors]) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as a tensor: the parameter itself is wanted, to put its gradient in.
        ctx.weight, ctx.queue = weight, queue
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.queue.append((ctx.weight, x, gradient))
        return gradient @ ctx.weight.to(gradient.dtype), None, None


@torch.no_grad()
def _accumulate(factors: list[Factors]) -> None:
    for weight, x, gradient in factors:
        product = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        if weight.grad is None:
            weight.grad = product.to(weight.dtype)
        else:
            weight.grad += product
