"""What is recorded of each layer, from the values that a step computes anyway."""

import numpy as np
import torch
from torch import Tensor

from nlm.anatomy import Role
from nlm.parallel.pieces import Pieces

SUBLAYERS = ("attn", "ffn")
SIGNALS = ("stream_rms_in", "branch_rms", "stream_rms_out")


class LayerStatistics:
    """One vector [L] a quantity: signals by sublayer, norms of gradients, weights and updates by role.

    The signals come out of the forward, the gradient norms out of clipping; only the size of the update needs
    a copy of the weights, which lives from `before_update` to `vectors`.
    """

    def __init__(self, pieces: Pieces, n_layers: int) -> None:
        self.pieces, self.n_layers = pieces, n_layers
        entries = [(i, w.role, w.site.layer) for i, w in enumerate(pieces.weights.values()) if w.site]
        self.roles = sorted({role for _, role, _ in entries}, key=list(Role).index)
        device = pieces.mesh.device
        self.indices = torch.tensor([i for i, _, _ in entries], device=device)
        cells = [layer * len(self.roles) + self.roles.index(role) for _, role, layer in entries]
        self.cells = torch.tensor(cells, device=device)
        self.before: list[Tensor] | None = None

    @torch.no_grad()
    def before_update(self) -> None:
        self.before = [piece.clone() for piece in self.pieces.tensors]

    @torch.no_grad()
    def vectors(self, signals: Tensor, gradient_norms: Tensor) -> dict[str, np.ndarray]:
        """After the update: signals [L 2 3] and gradient norms [P] -> name -> [L] float32, the same on every rank."""
        assert self.before is not None, "before_update was not called in this step"
        weight_norms = self.pieces.norms(self.before)
        torch._foreach_sub_(self.before, self.pieces.tensors)
        update_norms = self.pieces.norms(self.before)
        self.before = None
        gradient, weight, update = (self._by_layer_and_role(n) for n in (gradient_norms, weight_norms, update_norms))

        names = ["grad_norm/layer"]
        names += [f"{norm}/{role}" for norm in ("grad_norm", "weight_norm", "update_ratio") for role in self.roles]
        names += [f"{signal}/{sublayer}" for sublayer in SUBLAYERS for signal in SIGNALS]
        layer = gradient.norm(dim=1, keepdim=True)
        ratio = (update / weight).where(weight > 0, 0)  # what still is 0 has none
        columns = torch.cat([layer, gradient, weight, ratio, signals.flatten(1)], dim=1)
        table = columns.T.float().cpu().numpy()  # one transfer to the host
        return dict(zip(names, table, strict=True))

    def _by_layer_and_role(self, norms: Tensor) -> Tensor:
        """Norms [P] of single parameters -> [L R], joined over the parameters of a role (biases, gains)."""
        squares = torch.zeros(self.n_layers * len(self.roles), dtype=torch.float64, device=norms.device)
        squares.index_add_(0, self.cells, norms[self.indices].square())
        return squares.sqrt().view(self.n_layers, -1)
