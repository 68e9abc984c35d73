"""What normalizers of weights have to do at each update, beside the optimizer's own step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlm.model import Transformer
from nlm.optim.slices import Slices, products
from nlm.optim.spectral import SingularVectors
from nlm.parallel.pieces import Pieces
from nlm.weight_norms import NormLoss, Singular, SpectralRegularization

EPS = 1e-8
"""Beside the norm of a row, in the norm loss."""


class WeightNormUpdate:
    """Pulls by norm losses and spectral regularization, and singular vectors that follow. `shared` is to be saved."""

    def __init__(self, pieces: Pieces, models: Sequence[Transformer]) -> None:
        self.pieces = pieces
        norms = {name: models[0].weight_norm_of(weight) for name, weight in pieces.weights.items()}
        singular = [name for name, norm in norms.items() if isinstance(norm, Singular)]
        self.vectors = SingularVectors(pieces, models, singular) if singular else None

        def each(kind: type, field: str) -> Tensor | None:
            """[P], 0 for what has no such norm; None if nothing has."""
            values = [getattr(norm, field) if isinstance(norm, kind) else 0.0 for norm in norms.values()]
            return torch.tensor(values, dtype=torch.float64, device=pieces.mesh.device) if any(values) else None

        self.norm_loss, self.spectral = each(NormLoss, "strength"), each(SpectralRegularization, "strength")
        self.power = each(SpectralRegularization, "power")
        self.rows = Slices(pieces, over=1) if self.norm_loss is not None else None

    @property
    def shared(self) -> dict[str, Tensor]:
        return self.vectors.shared if self.vectors else {}

    @torch.no_grad()
    def __call__(self, lr: float, left_out: Tensor | None) -> None:
        """After the weights' own update; nothing changes where `left_out` [] is true."""
        if left_out is not None:
            lr = lr * ~left_out  # type: ignore[assignment]
        w = self.pieces.tensors
        if self.rows is not None and self.norm_loss is not None:
            lengths = self.rows.sums(products(w, w))[0].sqrt()
            pull = 2 * lr * self.norm_loss[self.rows.owner] * (1 - 1 / (lengths + EPS))
            torch._foreach_sub_(w, torch._foreach_mul(w, self.rows.spread(pull)))
        if self.vectors is None:
            return
        if self.spectral is not None and self.power is not None:
            rows, columns, k = self.vectors.rows, self.vectors.columns, self.power.clamp(min=1)
            u, v = self.vectors.joint["u"], self.vectors.joint["v"]
            sigma = rows.total(u * self.vectors.images(v))
            slope = 2 * k * (sigma**k - 1) * sigma ** (k - 1) * self.spectral
            for weight, left, right in zip(w, rows.spread(lr * u * slope[rows.owner]), columns.spread(v), strict=True):
                weight.sub_(left * right)
        self.vectors.update(left_out)

    def place(self) -> None:
        """After parameters and state have been read."""
        if self.vectors:
            self.vectors.place()
