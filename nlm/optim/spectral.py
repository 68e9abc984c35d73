"""Singular vectors that follow their matrices, by power iteration on the pieces that the ranks hold."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlm.model import Transformer
from nlm.optim.slices import Slices, products
from nlm.parallel.pieces import Pieces
from nlm.weight_norms import Singular


class SingularVectors:
    """u and v of every matrix that has a Singular, the same on every rank.

    `joint` has them in the places of the matrices' rows and columns, `shared`, which is to be saved, under the names of
    their buffers.
    """

    def __init__(self, pieces: Pieces, models: Sequence[Transformer], names: Sequence[str]) -> None:
        self.pieces = pieces
        modules = {name: module for model in models for name, module in model.named_modules()}
        owners = {name: f"{name.removesuffix('weight')}weight_norm" for name in names}
        self.modules: dict[str, Singular] = {
            name: modules[owner]
            for name, owner in owners.items()
            if owner in modules  # type: ignore[misc]
        }
        self.rows, self.columns = Slices(pieces, over=1), Slices(pieces, over=0)
        self.slices = {"u": self.rows, "v": self.columns}
        self.joint = {field: self._joined(field) for field in self.slices}
        self.shared = {
            f"{owner}.{field}": slices.by_parameter(self.joint[field])[name]
            for field, slices in self.slices.items()
            for name, owner in owners.items()
        }

    def _joined(self, field: str) -> Tensor:
        """[N], of the parts that the ranks' modules have."""
        slices = self.slices[field]
        sums = torch.zeros(2, slices.n, dtype=torch.float64, device=self.pieces.mesh.device)
        vectors, holders = (slices.by_parameter(row) for row in sums)
        for name, module in self.modules.items():
            (span,) = module.spans[field]
            vectors[name][span.start : span.stop] = getattr(module, field)
            holders[name][span.start : span.stop] = 1
        total, n_holders = self.pieces.mesh.sum(sums)
        return total / n_holders.clamp(min=1)

    @torch.no_grad()
    def update(self, left_out: Tensor | None) -> None:
        """After the weights': v ← Wᵀu and u ← W v, of length 1."""
        w = self.pieces.tensors
        v = _unit(self.columns, self.columns.sums(products(w, self.rows.spread(self.joint["u"])))[0])
        u = _unit(self.rows, self.images(v))
        for field, new in (("u", u), ("v", v)):
            old = self.joint[field]
            old.copy_(new if left_out is None else new.where(~left_out, old))
        self.place()

    def images(self, v: Tensor) -> Tensor:
        """W v of all matrices."""
        return self.rows.sums(products(self.pieces.tensors, self.columns.spread(v)))[0]

    @torch.no_grad()
    def place(self) -> None:
        """What the modules compute with, from what is shared."""
        for field, slices in self.slices.items():
            parts = slices.by_parameter(self.joint[field])
            for name, module in self.modules.items():
                (span,) = module.spans[field]
                getattr(module, field).copy_(parts[name][span.start : span.stop])


def _unit(slices: Slices, joint: Tensor) -> Tensor:
    """[N] -> [N]: each parameter's part with length 1."""
    lengths = slices.total(joint.square()).sqrt()
    return joint / lengths.where(lengths > 0, 1)[slices.owner]
