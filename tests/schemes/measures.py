"""What the claims are about: losses, streams, gradients and first updates of models built."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from nlm.anatomy import MATRICES
from nlm.model import Transformer, weights

SEQ_LEN = 64


def loss(model: Transformer, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def hidden(model: Transformer, rows: Tensor) -> Tensor:
    """[B S D]: what the last block leaves on the stream."""
    kept: list[Tensor] = []
    hook = list(model.blocks.values())[-1].register_forward_hook(lambda _, __, out: kept.append(out[0]))
    model(rows[:, :-1])
    hook.remove()
    return kept[0].detach()


def layer_gradients(model: Transformer, rows: Tensor) -> np.ndarray:
    """[L]: gradient norm of each layer's matrices."""
    loss(model, rows).backward()
    squares = np.zeros(model.config.n_layers)
    for _, parameter, weight in weights(model):
        if weight.site and weight.role in MATRICES:
            squares[weight.site.layer] += float(parameter.grad.double().square().sum())
    return np.sqrt(squares)


def update(model: Transformer, rows: Tensor, step: Callable[[Tensor], Tensor] = lambda gradient: gradient) -> float:
    """How much one step of 1e-7 on the block matrices moves what the last block leaves, relative to its size.

    In float64; `step` makes of a gradient what an optimizer would go along, times the scheme's own rates.
    """
    model.double()
    before = hidden(model, rows)
    loss(model, rows).backward()
    with torch.no_grad():
        for _, parameter, weight in weights(model):
            if weight.site and weight.role in MATRICES:
                parameter -= 1e-7 * model.scheme.group(weight).lr * step(parameter.grad)
    return float((hidden(model, rows) - before).norm() / before.norm())


def slope(depths: list[int], values: list[float]) -> float:
    """The power of depth that values grow by."""
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0])
