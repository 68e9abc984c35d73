"""On request: the effective rank of the stream, and the singular values of the weights."""

import torch
from torch import Tensor

from nlm.anatomy import MATRICES
from nlm.batch import Batch
from nlm.norms import precise
from nlm.optim.whole import gathered
from nlm.parallel.engine import Engine
from nlm.parallel.tensor import TensorParallel
from nlm.signals import Signals, that_count

POSITIONS = 1000
"""Of how many positions the effective rank is taken."""


class Features(Signals):
    """Of a forward, the effective rank of the stream after each layer instead of all else, summed over the first
    `n_rows` rows."""

    def __init__(self, tp: TensorParallel, n_rows: int) -> None:
        super().__init__(queries=1)
        self.tp, self.n_rows = tp, n_rows
        self.ranks: dict[int, Tensor] = {}

    def add(self, place: int, rows: Tensor, x: Tensor, layer: int) -> None:
        chosen = (self.tp.enter(x) if self.tp.sequence else x)[: self.n_rows]
        if self.view.positions is not None:
            positions = self.view.positions[: self.n_rows]
            chosen = that_count(chosen, positions)[positions.any(1)]
        self.ranks[layer] = effective_rank(chosen).sum()


def effective_rank(x: Tensor) -> Tensor:
    """[B S D] -> [B]: exp of the entropy of the singular values' shares (Roy & Vetterli 2007, eqs. 2 to 4)."""
    sizes = torch.linalg.svdvals(precise(x))
    return torch.special.entr(sizes / sizes.sum(1, keepdim=True)).sum(1).exp()


@torch.no_grad()
def effective_ranks(engine: Engine, rows: Batch) -> Tensor:
    """Of this rank's rows of a batch -> [L], the mean over those of the batch's first rows that hold POSITIONS,
    one at least; the same on every rank."""
    mesh, config = engine.mesh, engine.config
    n_rows = min(config.batch_rows, max(1, POSITIONS // config.train.seq_len))
    mine = min(max(0, n_rows - mesh.data_rank * len(rows)), len(rows))
    looked_at = engine.together(rows.first(mine).n_rows())
    ranks = torch.zeros(config.model.n_all_layers, dtype=torch.float64, device=mesh.device)
    stacks = [stack for model in engine.models for stack in model.stacks]
    for stack in stacks:
        stack.signals = Features(mesh.tp, mine)
    for model in engine.models:
        model.eval()
    engine.forward(rows.first(max(1, mine)))  # also where none is looked at: ranks compute together
    for stack in stacks:
        assert isinstance(stack.signals, Features)
        for layer, rank in stack.signals.ranks.items():
            ranks[layer] = rank if mesh.tp.rank == 0 else 0
        stack.signals = None
    for model in engine.models:
        model.train()
    return mesh.sum(ranks) / looked_at


@torch.no_grad()
def singular_values(engine: Engine) -> Tensor:
    """-> [P 2]: the largest and the smallest singular value of every matrix of the layers, NaN for what is none."""
    pieces, mesh = engine.pieces, engine.mesh
    found = torch.zeros(len(pieces.weights), 2, dtype=torch.float64, device=mesh.device)
    number = {name: i for i, name in enumerate(pieces.weights)}
    chosen = {name for name, weight in pieces.weights.items() if weight.site and weight.role in MATRICES}
    if mesh.rank("dp_replicate") == 0:
        for some in gathered(pieces, [name for name in pieces.names if name in chosen], pieces.tensors):
            for name in some.mine:
                found[number[name]] = torch.linalg.svdvals(some.matrices[name])[[0, -1]].to(found)
    mesh.sum(found)
    is_chosen = torch.tensor([name in chosen for name in pieces.weights], device=mesh.device)
    return found.where(is_chosen[:, None], torch.nan)
