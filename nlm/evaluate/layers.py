"""What each layer of a trained model does: the loss without it, the loss after it, and how streams resemble."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlm.batch import Batch
from nlm.model import Block, Run, Transformer
from nlm.norms import precise
from nlm.statistics.spectra import effective_rank

POSITIONS = 256
"""Of how many positions, evenly spread, streams are compared."""
LEAST = 4
"""Fewer have no unbiased estimate."""


@dataclass(frozen=True)
class Depth:
    """Stream l is that after l layers, 0 what enters the first. Losses in nats a token.

    `skipped`: of the layers `tested` [T], the loss [T] without the whole of each, under "layer", and without a sublayer
    under its name, NaN where a layer has none of that name. `idle` are the tested layers without which the loss changes
    by less than `threshold`, `loss_without_idle` that without all of them at once.
    """

    tokens: int
    loss: float
    lens: NDArray[np.float64]
    """[L+1]: the loss of the final norm and head on each stream."""
    rank: NDArray[np.float64]
    """[L+1]: the effective rank of a window of each stream, mean over windows."""
    similarity: NDArray[np.float64]
    """[L+1 L+1]: linear CKA of two streams."""
    tested: NDArray[np.int64]
    skipped: dict[str, NDArray[np.float64]]
    threshold: float
    idle: list[int]
    loss_without_idle: float


class Opened:
    """A model's forward of a batch, open between its layers."""

    def __init__(self, model: Transformer, batch: Batch) -> None:
        self.model, self.arguments = model, batch.arguments()
        self.n_targets = int(batch.n_targets())
        self.entered: Tensor
        self.run: Run

        def note(run: Run, places: range, x: Tensor) -> Tensor:
            self.run, self.entered = run, x
            return x

        self._loss(note)

    def after(self, x: Tensor, places: range) -> Tensor:
        """The stream [B S D] after these layers."""
        return self.run(places, x)

    def loss(self, x: Tensor) -> float:
        """What the last norm and the head make of a stream [B S D], the mean over all targets."""
        return self._loss(lambda run, places, _: x)

    def _loss(self, through: object) -> float:
        usual, self.model.through = self.model.through, through  # type: ignore[assignment]
        try:
            return float(self.model(*self.arguments)) / self.n_targets
        finally:
            self.model.through = usual


@torch.no_grad()
def depth(model: Transformer, batch: Batch, every: int = 1, threshold: float = 1e-3) -> Depth:
    """Of a whole model, on windows without padding; every `every`-th layer is skipped.

    What is skipped is not there: the stream goes on as it came, and no norm after the sum or factor on the stream is
    left of the sublayer's equation. Where the equation is x + …, that is a branch which gives 0.

    The stream before a layer is the same without it, so that L layers and their 2L sublayers take 3/2 L² blocks in all.
    """
    model.eval()
    opened, n_layers = Opened(model, batch), model.n_layers
    blocks = [block for block in model.blocks.values() if isinstance(block, Block)]
    names = ["layer", *dict.fromkeys(name for block in blocks for name in block.names)]
    tested = np.arange(0, n_layers, every)
    skipped = {name: np.full(len(tested), np.nan) for name in names}
    lens, rank, centred = [], [], []
    x = opened.entered
    for l in range(n_layers + 1):
        lens.append(opened.loss(x))
        rank.append(float(effective_rank(x).mean()))
        centred.append(centred_products(sample(x)))
        if l == n_layers:
            break
        if l % every == 0:
            skipped["layer"][l // every] = opened.loss(opened.after(x, range(l + 1, n_layers)))
            for name in blocks[l].names:
                with without(blocks[l], name):
                    skipped[name][l // every] = opened.loss(opened.after(x, range(l, n_layers)))
        x = opened.after(x, range(l, l + 1))
    loss = lens[-1]
    idle = tested[np.abs(skipped["layer"] - loss) < threshold].tolist()
    kept = opened.entered
    for l in sorted(set(range(n_layers)) - set(idle)):
        kept = opened.after(kept, range(l, l + 1))
    return Depth(
        tokens=opened.n_targets,
        loss=loss,
        lens=np.array(lens),
        rank=np.array(rank),
        similarity=similarity(torch.stack(centred)),
        tested=tested,
        skipped=skipped,
        threshold=threshold,
        idle=idle,
        loss_without_idle=opened.loss(kept),
    )


@contextmanager
def without(block: Block, name: str) -> Iterator[None]:
    """The block has no such sublayer inside."""
    names, block.names = block.names, [other for other in block.names if other != name]
    try:
        yield
    finally:
        block.names = names


def sample(x: Tensor) -> Tensor:
    """[B S D] -> [N D]: at most POSITIONS, evenly spread."""
    rows = x.flatten(0, 1)
    n = min(POSITIONS, len(rows))
    return rows[torch.arange(n, device=x.device) * len(rows) // n]


def centred_products(x: Tensor) -> Tensor:
    """[N D] -> [N²] float32: K = x xᵀ, U-centred: the inner product of two such, over N (N - 3), is the unbiased
    estimate of HSIC (Székely & Rizzo 2014, Ann. Stat. 42(6), eq. 3.1; Song et al. 2012, JMLR 13, eq. 5)."""
    n = len(x)
    assert n >= LEAST, f"{n} positions"
    x = precise(x).double()
    k = (x @ x.T).fill_diagonal_(0)
    rows = k.sum(1)
    k = k - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    k = k.fill_diagonal_(0).flatten()
    return (k / k.norm()).float()  # of any length: CKA is a ratio


def similarity(centred: Tensor) -> NDArray[np.float64]:
    """[K N²] of length 1 -> [K K]: linear CKA = HSIC(a, b) / sqrt(HSIC(a, a) HSIC(b, b)) (Kornblith et al. 2019,
    arXiv:1905.00414, eq. 4), of unbiased estimates (Nguyen et al. 2021, arXiv:2010.15327, eq. 3); it may be below 0."""
    return (centred @ centred.T).double().cpu().numpy()  # type: ignore[no-any-return]
