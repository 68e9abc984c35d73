"""Projection of weights to unit norm after a step, for the schemes that ask for it."""

from collections.abc import Callable

import torch

from nlm.init import projected, to_unit
from nlm.model import Transformer


def projection(model: Transformer) -> Callable[[], None]:
    """The function to call after each optimizer step; it does nothing for a scheme that projects nothing."""
    targets = projected(model)

    @torch.no_grad()
    def project() -> None:
        for parameter, axis in targets:
            to_unit(parameter, axis)

    return project
