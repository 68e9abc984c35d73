"""Normalizers in weight space, and WEIGHT_NORMS, the choice by name: what the forward makes of a matrix.

The norm is of a whole row [in], of which tensor parallel ranks may have parts. Its gradient reaches the matrix.
"""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from nlm.anatomy import Role, Span
from nlm.norms import precise, unit
from nlm.parallel.tensor import TensorParallel

Initial = dict[str, float | Callable[[Tensor], Tensor]]


class WeightNorm(nn.Module):
    """weight [out in] -> [out in]; `outputs` and `inputs` say which part of the whole matrix this rank has."""

    inside = True
    spans: dict[str, tuple[Span, ...]]

    def __init__(self, outputs: Span, inputs: Span, tp: TensorParallel) -> None:
        super().__init__()
        self.outputs, self.inputs, self.tp = outputs, inputs, tp

    def row_sum(self, x: Tensor) -> Tensor:
        """[out in/n] -> [out 1], over the whole rows."""
        total = x.sum(1, keepdim=True)
        return total if self.inputs.is_whole else self.tp.sum(total)

    def unit_rows(self, weight: Tensor) -> Tensor:
        weight = precise(weight)
        return weight * self.row_sum(weight.square()).clamp(min=1e-24).rsqrt()

    def standardized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """-> the rows less their means, and the sums of their squares [out 1]."""
        weight = precise(weight)
        centred = weight - self.row_sum(weight) / self.inputs.full
        return centred, self.row_sum(centred.square())


class Conditioning(WeightNorm):
    """P W with the diagonal P = 1 / ‖W_i‖ over the rows, which among all diagonals brings the condition number within
    sqrt(out) of the least (van der Sluis 1969; Saratchandran et al. 2024, of which only the abstract was read)."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.unit_rows(weight)


class Standardization(WeightNorm):
    """(W - mean) / (std + 1e-5) over each row, with the unbiased std (Qiao et al. 2019, arXiv:1903.10520, eq. 4)."""

    def forward(self, weight: Tensor) -> Tensor:
        centred, squares = self.standardized(weight)
        return centred / ((squares / (self.inputs.full - 1)).clamp(min=1e-24).sqrt() + 1e-5)


class Gained(WeightNorm):
    """With a learned gain for each output."""

    roles = {"gain": Role.SCALE}
    initial: Initial = {"gain": 1.0}

    def __init__(self, outputs: Span, inputs: Span, tp: TensorParallel) -> None:
        super().__init__(outputs, inputs, tp)
        self.spans = {"gain": (outputs,)}
        self.gain = nn.Parameter(torch.empty(len(outputs)))


class ScaledStandardization(Gained):
    """γ (W - mean) / sqrt(max(var · in, 1e-4)) over each row, biased variance: rows of norm γ and sum 0 (Brock et al.
    2021, arXiv:2101.08692, eq. 1; the limit is that of the authors' code)."""

    def forward(self, weight: Tensor) -> Tensor:
        centred, squares = self.standardized(weight)
        return self.gain[:, None] * centred * squares.clamp(min=1e-4).rsqrt()


class WeightNormalization(Gained):
    """g v / ‖v‖ over each row; g starts at ‖v‖ (Salimans & Kingma 2016, arXiv:1602.07868, eq. 2)."""

    initial: Initial = {"gain": lambda matrix: matrix.norm(dim=1)}

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain[:, None] * self.unit_rows(weight)


class Singular(WeightNorm):
    """Something that knows the singular vectors u and v of the matrix's largest singular value.

    They follow the matrix by one power iteration after each update (`nlm.optim.spectral`), never in the forward, which
    recomputation and microbatches repeat. No gradient flows through them.
    """

    def __init__(self, outputs: Span, inputs: Span, tp: TensorParallel) -> None:
        super().__init__(outputs, inputs, tp)
        self.spans = {"u": (outputs,), "v": (inputs,)}
        self.initial: Initial = {
            "u": lambda matrix: singular_vectors(matrix)[0],
            "v": lambda matrix: singular_vectors(matrix)[1],
        }
        self.u: Tensor
        self.v: Tensor
        self.register_buffer("u", torch.empty(len(outputs)))
        self.register_buffer("v", torch.empty(len(inputs)))


class Spectral(Singular):
    """γ W / σ with the largest singular value σ = uᵀ W v, and one learned γ that starts at 1 (σReparam, Zhai et al.
    2023, arXiv:2303.06296, eq. 4; Miyato et al. 2018, arXiv:1802.05957)."""

    roles = {"gain": Role.SCALE}

    def __init__(self, outputs: Span, inputs: Span, tp: TensorParallel) -> None:
        super().__init__(outputs, inputs, tp)
        self.spans["gain"] = (Span.whole(1),)
        self.initial["gain"] = 1.0
        self.gain = nn.Parameter(torch.empty(1))

    def forward(self, weight: Tensor) -> Tensor:
        weight = precise(weight)
        sigma = self.u @ (weight @ self.v)
        whole = self.outputs.is_whole and self.inputs.is_whole
        return weight * (self.gain / (sigma if whole else self.tp.sum(sigma)))


class NormLoss(WeightNorm):
    """The matrix itself, whose rows each update pulls to norm 1, in the place of weight decay: a decoupled step on
    `strength` · Σ (1 - ‖W_i‖)² (Georgiou et al. 2021, arXiv:2103.06583; the strength is Ranger21's)."""

    def __init__(self, outputs: Span, inputs: Span, tp: TensorParallel, *, strength: PositiveFloat = 1e-4) -> None:
        super().__init__(outputs, inputs, tp)
        self.strength = strength

    def forward(self, weight: Tensor) -> Tensor:
        return weight


class SpectralRegularization(Singular):
    """The matrix itself, whose largest singular value each update pulls to 1: a decoupled step on `strength` ·
    (σ^`power` - 1)² (Lewandowski et al. 2024, arXiv:2406.06811; power and strength UNVERIFIED)."""

    def __init__(
        self,
        outputs: Span,
        inputs: Span,
        tp: TensorParallel,
        *,
        strength: PositiveFloat = 1e-4,
        power: PositiveInt = 2,
    ) -> None:
        super().__init__(outputs, inputs, tp)
        self.strength, self.power = strength, power

    def forward(self, weight: Tensor) -> Tensor:
        return weight


POWER_ITERATIONS = 15
"""Of a new matrix, whose singular vectors are not known yet."""


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[out in] -> u [out] and v [in] of about the largest singular value."""
    v = unit(torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=matrix.dtype))
    for _ in range(POWER_ITERATIONS):
        u = unit(matrix @ v)
        v = unit(matrix.T @ u)
    return u, v


MakeWeightNorm = Callable[[Span, Span, TensorParallel], WeightNorm]

WEIGHT_NORMS: dict[str, type[WeightNorm]] = {
    "weight_norm": WeightNormalization,
    "weight_standardization": Standardization,
    "scaled_weight_standardization": ScaledStandardization,
    "weight_conditioning": Conditioning,
    "spectral": Spectral,
    "norm_loss": NormLoss,
    "spectral_regularization": SpectralRegularization,
}
