"""Loss on text: perplexity, bits per byte, calibration, and the loss at each position of the context; of an encoder, on
the tokens that are hidden from it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlm.batch import KEPT
from nlm.config import Config, ConfigError
from nlm.evaluate.corpus import Corpus
from nlm.evaluate.loss import also_called
from nlm.evaluate.masked import masked_rows
from nlm.evaluate.predictions import predictions
from nlm.evaluate.windows import Row, Windows, batches, cut, rows
from nlm.parallel.engine import Inference

BINS = 15
"""Of confidence, of equal width (Guo et al. 2017, arXiv:1706.04599, section 4)."""
BUCKETS = 24
"""Of positions, at most; they become wider by the same factor."""


@dataclass(frozen=True)
class Reading:
    """How text is read: in windows of `window` tokens, each `stride` after the one before; of `tokens`, at most so many
    from the beginning are predicted or, by an encoder, read."""

    window: int
    stride: int
    tokens: int | None = None


def reading(
    config: Config,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    tasks: bool = False,
) -> Reading:
    """By default windows are as long as the context of training; a decoder's overlap by half, an encoder's never.

    Errors: ConfigError for a model that cannot, or has no next token for `tasks`, and for windows or strides that do
    not fit.
    """
    model, longest, problems = config.model, config.train.seq_len, []
    window = longest if window is None else window
    if model.reads_source or (model.is_encoder and tasks):
        asked = "--tasks: " if tasks else ""
        problems.append(
            f"{asked}expected model.architecture = 'decoder', which predicts a text's next token, got "
            f"{model.architecture!r}"
        )
    if model.is_encoder and stride is not None:
        problems.append(f"--stride: an encoder's windows do not overlap, got {stride}; leave it out")
    if stride is None or model.is_encoder:
        stride = window if model.is_encoder else max(1, window // 2)
    if not 1 <= window <= longest:
        problems.append(f"--window: expected 1 to train.seq_len = {longest}, the longest context learned, got {window}")
    elif not 1 <= stride <= window:
        problems.append(f"--stride: expected 1 to the window's {window}, or tokens would be left out, got {stride}")
    if tokens is not None and tokens < 1:
        problems.append(f"--tokens: expected at least 1, got {tokens}")
    if problems:
        raise ConfigError(problems)
    return Reading(window, stride, tokens)


class Tally:
    """Sums over the windows that this rank has seen, in float64."""

    def __init__(self, window: int, device: torch.device) -> None:
        self.positions = torch.zeros(2, window, dtype=torch.float64, device=device)
        """Σ loss and how many, of every target of every window."""
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        """How many, Σ confidence and Σ correct, of the scored ones."""
        self.total = torch.zeros(3, dtype=torch.float64, device=device)
        """How many, Σ loss and Σ correct, likewise."""

    def add(self, inference: Inference, batch: Windows) -> None:
        """[B S]."""
        loss, confidence, correct = (x.double() for x in predictions(inference, batch))
        assert batch.real is not None and batch.scored is not None
        real, scored = (x.to(loss.device) for x in (batch.real, batch.scored))
        self.positions[:, : loss.shape[1]] += torch.stack([loss.sum(0), real.sum(0)])
        ones = torch.ones_like(loss)
        self.total += torch.stack([x[scored].sum() for x in (ones, loss, correct)])
        bins = (confidence[scored] * BINS).long().clamp(max=BINS - 1)
        for sums, x in zip(self.bins, (ones, confidence, correct), strict=True):
            sums.index_add_(0, bins, x[scored])

    def join(self, inference: Inference) -> None:
        """Over all ranks; those of a tensor parallel group have seen the same."""
        for sums in (self.positions, self.bins, self.total):
            inference.mesh.sum(sums if inference.mesh.tp.rank == 0 else sums.zero_())


@torch.no_grad()
def measure(
    inference: Inference, corpus: Corpus, how: Reading, after_each: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """All that is said of a corpus, as JSON has it; the same on all ranks, in any layout without a pipeline.

    Errors: ValueError for a corpus without a token to predict.
    """
    config, mesh, encoder = inference.config, inference.mesh, inference.config.model.is_encoder
    counts = Counts(bytes=None if encoder else 0)
    multiple = config.parallel.tp if config.parallel.sequence_parallel else 1
    longest = -(-how.window // multiple) * multiple
    tally, length = Tally(longest, mesh.device), longest if config.parallel.compile else None
    found = _masked if encoder else _rows
    for batch in batches(found(corpus, config, how, counts), config.batch_rows, multiple, length):
        tally.add(inference, batch.chunk(mesh.data_size)[mesh.data_rank])
        after_each()
    tally.join(inference)
    n, loss, correct = tally.total.tolist()
    if not n:
        raise ValueError(f"{', '.join(map(str, [*corpus.shards, *corpus.files]))}: no token to predict; give more text")
    assert n == counts.tokens, f"{n:.0f} tokens seen of {counts.tokens}"
    count, confidence, right = (x / tally.bins[0].clamp(min=1) if i else x for i, x in enumerate(tally.bins))
    per_token = None if counts.bytes is None else counts.bytes / n
    return {
        "window": how.window,
        "stride": how.stride,
        "documents": counts.documents,
        "tokens": counts.tokens,
        **(
            {"of_tokens": counts.read, "masked_share": config.train.masked_share}
            if encoder
            else {"bytes": counts.bytes}
        ),
        "loss": loss / n,
        **also_called(loss / n, per_token),
        "accuracy": correct / n,
        "calibration_error": float((count * (confidence - right).abs()).sum() / n),
        "reliability": [
            {"from": i / BINS, "to": (i + 1) / BINS, "tokens": int(k), "confidence": c, "accuracy": r}
            for i, (k, c, r) in enumerate(zip(count.tolist(), confidence.tolist(), right.tolist(), strict=True))
            if k
        ],
        **({} if encoder else {"by_position": list(_by_position(tally.positions))}),
    }


@dataclass
class Counts:
    """Of what was read; `tokens` are those that were predicted, and `bytes` is None where they are not known."""

    documents: int = 0
    read: int = 0
    tokens: int = 0
    bytes: int | None = 0


def _rows(corpus: Corpus, config: Config, how: Reading, counts: Counts) -> Iterator[Row]:
    """The first token of a document is predicted from the mark that ends a document, where training has it so."""
    eod = None if config.data.document_mask else corpus.eod
    for document in corpus.documents():
        left = None if how.tokens is None else how.tokens - counts.tokens
        if left == 0:
            return
        if left is not None:
            document = cut(document, left + (eod is None), corpus.coder)
        tokens, n_bytes = document
        if eod is None:
            unpredicted = cut(document, 1, corpus.coder).bytes
            n_bytes = None if n_bytes is None or unpredicted is None else n_bytes - unpredicted
        else:
            tokens = np.concatenate([[eod], tokens])
        counts.documents += 1
        counts.tokens += len(tokens) - 1
        counts.bytes = None if n_bytes is None or counts.bytes is None else counts.bytes + n_bytes
        yield from rows(tokens, how.window, how.stride)


def _masked(corpus: Corpus, config: Config, how: Reading, counts: Counts) -> Iterator[Row]:
    for row in masked_rows(_texts(corpus, how, counts), config, how.window):
        assert row.stand_ins is not None
        counts.tokens += int((row.stand_ins[-row.scored - 1 : -1] != KEPT).sum())
        yield row


def _texts(corpus: Corpus, how: Reading, counts: Counts) -> Iterator[NDArray[np.integer]]:
    """The documents' tokens, those at the ends among them."""
    for tokens, _ in corpus.documents():
        if counts.read == how.tokens:
            return
        tokens = tokens if how.tokens is None else tokens[: how.tokens - counts.read]
        counts.documents += 1
        counts.read += len(tokens)
        yield tokens


def _by_position(positions: Tensor) -> Iterator[dict[str, Any]]:
    """Σ loss and how many [2 W] -> the mean of some positions together, each as the number of tokens that are seen."""
    seen = int(positions[1].nonzero().max()) + 1
    edges = np.unique(np.geomspace(1, seen + 1, BUCKETS + 1).round().astype(int))
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        loss, count = positions[:, start - 1 : stop - 1].sum(1).tolist()
        yield {"from": start, "to": stop - 1, "tokens": int(count), "loss": loss / count if count else None}
