"""What is recorded of each layer, from the values that a step computes anyway."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nlm.anatomy import Role
from nlm.model import Transformer, weights

SUBLAYERS = ("attn", "ffn")
SIGNALS = ("stream_rms_in", "branch_rms", "stream_rms_out")


class LayerStatistics:
    """One vector [L] a quantity: signals by sublayer, norms of gradients, weights and updates by role.

    The signals come out of the forward, the gradient norms out of clipping; only the size of the update needs
    a copy of the blocks' weights, which lives from `before_update` to `vectors`.
    """

    def __init__(self, model: Transformer) -> None:
        entries = [(i, p, w.role, w.site.layer) for i, (_, p, w) in enumerate(weights(model)) if w.site]
        self.roles = sorted({role for _, _, role, _ in entries}, key=list(Role).index)
        self.parameters: list[Tensor] = [p for _, p, _, _ in entries]
        self.n_layers = model.config.n_layers
        device = self.parameters[0].device
        self.indices = torch.tensor([i for i, _, _, _ in entries], device=device)
        cells = [layer * len(self.roles) + self.roles.index(role) for _, _, role, layer in entries]
        self.cells = torch.tensor(cells, device=device)
        self.before: list[Tensor] | None = None

    @torch.no_grad()
    def before_update(self) -> None:
        self.before = [p.clone() for p in self.parameters]

    @torch.no_grad()
    def vectors(self, signals: Sequence[Tensor], gradient_norms: Tensor) -> dict[str, np.ndarray]:
        """After the update: signals, one [L 2 3] a microbatch, and gradient norms [P] -> name -> [L] float32."""
        assert self.before is not None, "before_update was not called in this step"
        rms = torch.stack(list(signals)).square().mean(0).sqrt()  # [L 2 3]
        gradient = self._by_layer_and_role(gradient_norms[self.indices])
        weight = self._by_layer_and_role(torch.stack(torch._foreach_norm(self.before)))
        torch._foreach_sub_(self.before, self.parameters)
        update = self._by_layer_and_role(torch.stack(torch._foreach_norm(self.before)))
        self.before = None

        names = ["grad_norm/layer"]
        names += [f"{norm}/{role}" for norm in ("grad_norm", "weight_norm", "update_ratio") for role in self.roles]
        names += [f"{signal}/{sublayer}" for sublayer in SUBLAYERS for signal in SIGNALS]
        layer = gradient.norm(dim=1, keepdim=True)
        columns = torch.cat([layer, gradient, weight, update / weight, rms.flatten(1)], dim=1)
        table = columns.T.float().cpu().numpy()  # one transfer to the host
        return dict(zip(names, table, strict=True))

    def _by_layer_and_role(self, norms: Tensor) -> Tensor:
        """Norms [P] of single parameters -> [L R], joined over the parameters of a role (biases, gains).

        In float64: the squares of vanishing gradients leave float32's range.
        """
        squares = torch.zeros(self.n_layers * len(self.roles), dtype=torch.float64, device=norms.device)
        return squares.index_add_(0, self.cells, norms.double().square()).sqrt().view(self.n_layers, -1)
