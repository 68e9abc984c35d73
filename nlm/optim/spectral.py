"""Singular vectors that follow their matrices, by power iteration on the pieces that the ranks hold."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlm.model import Transformer
from nlm.optim.slices import Slices, products
from nlm.parallel.pieces import Pieces
from nlm.weight_norms import Spectral


def singular_vectors(pieces: Pieces, models: Sequence[Transformer]) -> "SingularVectors | None":
    """None where no rank has a matrix that needs them."""
    mine = sum(isinstance(module, Spectral) for model in models for module in model.modules())
    n = pieces.mesh.sum(torch.tensor(mine, device=pieces.mesh.device))
    return SingularVectors(pieces, models) if n else None


class SingularVectors:
    """u and v of every matrix that a Spectral normalizes, the same on every rank.

    `shared`, under the names of its buffers, is to be saved.
    """

    def __init__(self, pieces: Pieces, models: Sequence[Transformer]) -> None:
        self.pieces = pieces
        self.modules = {
            f"{name.removesuffix('weight_norm')}weight": module
            for model in models
            for name, module in model.named_modules()
            if isinstance(module, Spectral)
        }
        self.slices = {"u": Slices(pieces, over=1), "v": Slices(pieces, over=0)}
        self.joint = {field: self._joined(field) for field in self.slices}
        self.shared = {
            f"{matrix.removesuffix('weight')}weight_norm.{field}": part
            for field, slices in self.slices.items()
            for matrix, part in slices.by_parameter(self.joint[field]).items()
            if part.any()
        }

    def _joined(self, field: str) -> Tensor:
        """[N], of the parts that the ranks' modules have."""
        slices = self.slices[field]
        sums = torch.zeros(2, slices.n, dtype=torch.float64, device=self.pieces.mesh.device)
        vectors, holders = (slices.by_parameter(row) for row in sums)
        for matrix, module in self.modules.items():
            (span,) = module.spans[field]
            vectors[matrix][span.start : span.stop] = getattr(module, field)
            holders[matrix][span.start : span.stop] = 1
        total, n_holders = self.pieces.mesh.sum(sums)
        return total / n_holders.clamp(min=1)

    @torch.no_grad()
    def update(self, left_out: Tensor | None) -> None:
        """After the weights': v ← Wᵀu and u ← W v, of length 1."""
        rows, columns, w = self.slices["u"], self.slices["v"], self.pieces.tensors
        v = _unit(columns, columns.sums(products(w, rows.spread(self.joint["u"])))[0])
        u = _unit(rows, rows.sums(products(w, columns.spread(v)))[0])
        for field, new in (("u", u), ("v", v)):
            old = self.joint[field]
            old.copy_(new if left_out is None else new.where(~left_out, old))
        self.place()

    @torch.no_grad()
    def place(self) -> None:
        """What the modules compute with, from what is shared."""
        for field, slices in self.slices.items():
            parts = slices.by_parameter(self.joint[field])
            for matrix, module in self.modules.items():
                (span,) = module.spans[field]
                getattr(module, field).copy_(parts[matrix][span.start : span.stop])


def _unit(slices: Slices, joint: Tensor) -> Tensor:
    """[N] -> [N]: each parameter's part with length 1."""
    lengths = slices.total(joint.square()).sqrt()
    return joint / lengths.where(lengths > 0, 1)[slices.owner]
