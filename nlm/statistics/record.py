"""What is recorded of each layer, from the values that a step computes anyway."""

import numpy as np
import torch
from torch import Tensor

from nlm.config import StatisticsConfig
from nlm.parallel.engine import Engine
from nlm.statistics.forward import ForwardStatistics
from nlm.statistics.weights import WeightStatistics


class LayerStatistics:
    """One vector [L] a quantity: of the sublayers from the forward, of gradients, weights and updates by role."""

    def __init__(self, engine: Engine, config: StatisticsConfig) -> None:
        self.forward, self.weights = ForwardStatistics(engine, config.queries), WeightStatistics(engine)

    def begin(self) -> None:
        """Before a step that is to be recorded."""
        self.forward.begin()

    def before_update(self) -> None:
        """After its backward."""
        self.weights.before_update()

    def vectors(self, gradient_norms: Tensor) -> dict[str, np.ndarray]:
        """After its update, with the norms of the gradients [P] -> "quantity/part", [L] float32, the same on every
        rank in every layout: see quantities.py."""
        vectors = self.forward.vectors() | self.weights.vectors(gradient_norms)
        table = torch.stack(list(vectors.values())).float().cpu().numpy()  # one transfer to the host
        return dict(zip(vectors, table, strict=True))
