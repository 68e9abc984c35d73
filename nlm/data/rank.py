"""A run's data as one rank sees it: its rows of each batch, as tensors, and the validation batches of all."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nlm.batch import Batch
from nlm.config import Config
from nlm.data.corpus import Corpus
from nlm.data.masked import stand_ins
from nlm.data.pairs import PairCorpus, PairRows, Pairs, multiple, pairs_of, shuffled
from nlm.data.source import Rows, ShardSource
from nlm.mesh import Mesh
from nlm.random import row_keys


class RankData:
    """Every rank reads its own rows; of streams, the one that speaks reads all rows and passes them on.

    Errors: as of Corpus and PairCorpus; ValueError for a text where pairs are to be read.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        translates = config.data.has_pairs
        if config.model.reads_source and not translates:
            raise ValueError(
                "data.train: expected pairs for model.architecture = 'encoder_decoder', got text; set path and "
                "languages in [data.train], or another architecture"
            )
        self.corpus = PairCorpus(config) if translates else Corpus(config)
        self._validation: ShardSource | Pairs | None = None
        if (path := config.data.validation) is not None and translates:
            self._validation = pairs_of(config, path)
        elif path is not None:
            self._validation = ShardSource(
                path, config.train.seq_len, config.model.n_tokens, 0, config.data.document_mask
            )

    def rows(self, batch: int) -> Batch:
        """This rank's rows of batch 1, 2, …"""
        mesh = self.mesh
        if isinstance(self.corpus, PairCorpus):
            pairs = self.corpus.batch(batch, mesh.data_rank, mesh.data_size)
            # No batch has more rows than tokens.
            first = batch * self.config.train.batch_tokens + mesh.data_rank * len(pairs.tokens)
            return pair_batch(self.config, pairs, first).to(mesh.device)
        n_rows = self.config.batch_rows // mesh.data_size
        first = (batch * mesh.data_size + mesh.data_rank) * n_rows
        if self.corpus.seeks or mesh.device_mesh is None:
            mine = tensors(self.corpus.batch(batch, mesh.data_rank, mesh.data_size))
            return batch_of(self.config, mine, first).to(mesh.device)
        shape = (self.config.batch_rows, self.config.train.seq_len + 1)
        both = torch.empty(2, *shape, dtype=torch.int64)
        if mesh.speaks:
            both = torch.stack(tensors(self.corpus.batch(batch)))
        both = both.to(mesh.device)
        dist.broadcast(both, 0)
        return batch_of(self.config, both.chunk(mesh.data_size, dim=1)[mesh.data_rank], first).to(mesh.device)

    def digest(self, rows: Batch) -> int:
        """Of this rank's rows and all others' -> 32 bits by which to see whether two batches are the same."""
        mesh = self.mesh
        mine = rows.digest(mesh.data_rank * len(rows))
        if mesh.tp.rank or mesh.rank("pp"):
            mine.zero_()
        return int(mesh.sum(mine)) & 0xFFFFFFFF

    @property
    def validation_bytes_per_token(self) -> float | None:
        """Of all its text, a decoder's to predict; None where that is not known."""
        if not isinstance(self._validation, ShardSource) or self.config.model.is_encoder:
            return None
        return self._validation.bytes_per_token

    @property
    def validation_pairs(self) -> Pairs:
        """Errors: ValueError where there are none."""
        if not isinstance(self._validation, Pairs):
            raise ValueError("data.validation: expected shards of pairs, for evaluate.translations; set it, or set 0")
        return self._validation

    def validation_batches(self) -> Iterator[Batch] | None:
        """At most evaluate.batches of them, in the corpus's order, no token a target twice; the last may be short.

        Of pairs, batches of like length in a random order, always the same."""
        source, size = self._validation, self.config.batch_rows
        if source is None:
            return None
        if isinstance(source, Pairs):
            sizes = source.sizes
            every = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(n) for n in sizes])
            chosen = shuffled(source.cut(*every, self.config.train.batch_tokens), 0)[: self.config.evaluate.batches]
            n = multiple(self.config)
            return (pair_batch(self.config, source.rows(*pairs, multiple=n), 0, False) for pairs in chosen)
        n_rows = min(source.n_rows, self.config.evaluate.batches * size)
        return (
            batch_of(self.config, tensors(source.in_order(np.arange(start, min(start + size, n_rows)))), start, False)
            for start in range(0, n_rows, size)
        )


def batch_of(config: Config, both: Iterable[Tensor], first: int, training: bool = True) -> Batch:
    """Tokens and starts [B S+1], the first of them row `first` of the whole run -> what a model is to read of them.

    Where something is random, it is so by the seed and the rows' numbers.
    """
    model, (tokens, starts) = config.model, both
    keys = _keys(config, tokens, first)
    return Batch(
        tokens,
        starts.cumsum(1) if config.data.document_mask else None,
        keys if model.stochastic_depth and training else None,
        stand_ins(tokens, keys, model.vocab_size, config.train.masked_share) if model.is_encoder else None,
    )


def pair_batch(config: Config, rows: PairRows, first: int, training: bool = True) -> Batch:
    """As `batch_of`, of sources and targets."""
    source, tokens = map(torch.from_numpy, rows)
    keys = _keys(config, tokens, first) if config.model.stochastic_depth and training else None
    return Batch(tokens, keys=keys, source=source, padding=config.model.padding)


def _keys(config: Config, tokens: Tensor, first: int) -> Tensor:
    """[B S+1] -> [B], random numbers of the rows."""
    return row_keys(config.train.seed, torch.arange(first, first + len(tokens), device=tokens.device))


def tensors(rows: Rows) -> tuple[Tensor, Tensor]:
    """Tokens and starts [B S+1], both int64."""
    return torch.from_numpy(rows.tokens), torch.from_numpy(rows.starts).long()
