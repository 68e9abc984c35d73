"""What is recorded of each layer: from the values that a step computes anyway, and on request from others."""

import numpy as np
import torch
from torch import Tensor

from nlm.batch import Batch
from nlm.config import StatisticsConfig
from nlm.parallel.engine import Engine
from nlm.statistics.forward import ForwardStatistics
from nlm.statistics.noise import half_batch, signal_and_noise
from nlm.statistics.spectra import effective_ranks, singular_values
from nlm.statistics.weights import WeightStatistics


class LayerStatistics:
    """One vector [L] a quantity: of the sublayers from the forward, of gradients, weights and updates by role."""

    def __init__(self, engine: Engine, config: StatisticsConfig) -> None:
        self.engine, self.config = engine, config
        self.forward, self.weights = ForwardStatistics(engine, config.queries), WeightStatistics(engine)
        self.requested: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether a step has something to record on request."""
        return _due(step, self.config.spectra_every) or _due(step, self.config.noise_every)

    def begin(self, rows: Batch, step: int = 0) -> None:
        """Before the forward of rows that is to be recorded; with the number of a step, what is due then."""
        self.requested = self._spectra(rows if _due(step, self.config.spectra_every) else None)
        self.half = half_batch(self.engine, rows) if _due(step, self.config.noise_every) else None
        self.forward.begin()

    def before_update(self) -> None:
        """After its backward."""
        self.weights.before_update()

    def vectors(self, gradient_norms: Tensor) -> dict[str, np.ndarray]:
        """After its update, with the norms of the gradients [P] -> "quantity/part", [L] float32, the same on every
        rank in every layout: see quantities.py. What was not due is NaN."""
        vectors = self.forward.vectors() | self.weights.vectors(gradient_norms)
        vectors |= self.requested | self._noise(gradient_norms)
        table = torch.stack(list(vectors.values())).float().cpu().numpy()  # one transfer to the host
        return dict(zip(vectors, table, strict=True))

    def _spectra(self, rows: Batch | None) -> dict[str, Tensor]:
        if not self.config.spectra_every:
            return {}
        if rows is None:
            ranks, values = self._nothing(self.forward.n_layers), self._nothing(len(self.engine.pieces.weights), 2)
        else:
            ranks, values = effective_ranks(self.engine, rows), singular_values(self.engine)
        largest, smallest = values.unbind(1)
        return (
            {"effective_rank/layer": ranks}
            | self.weights.greatest("largest_singular_value", largest)
            | self.weights.greatest("condition_number", largest / smallest)
        )

    def _noise(self, gradient_norms: Tensor) -> dict[str, Tensor]:
        if not self.config.noise_every:
            return {}
        if self.half is None:
            signal = noise = self._nothing(self.forward.n_layers)
        else:
            half, whole = self.weights.by_layer(self.half.norms), self.weights.by_layer(gradient_norms)
            signal, noise = signal_and_noise(whole, half, self.half.rows, self.half.share)
        return {"gradient_signal/layer": signal, "gradient_noise/layer": noise}

    def _nothing(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float64, device=self.engine.mesh.device)


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0
