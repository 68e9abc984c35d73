"""The training data of a config: its sources, mixed, one batch a step."""

from functools import cached_property
from typing import Any

import numpy as np

from nlm.config import Config, SourceConfig
from nlm.data.mixture import Mixture
from nlm.data.source import Rows, ShardSource, Source


class Corpus:
    """Batches of rows, of which each is a function of (config, its number).

    Errors: ValueError for data that is missing, damaged, too short or not the vocabulary's.
    """

    def __init__(self, config: Config) -> None:
        self.batch_rows = config.batch_rows
        self.sources = [_open(source, config) for source in config.data.sources]
        weights = [source.weight for source in config.data.sources]
        sizes = [source.n_tokens for source in self.sources if isinstance(source, ShardSource)]
        self._mixture = Mixture([w for w in weights if w is not None] or sizes, config.train.seed)
        self.seeks = all(source.seeks for source in self.sources)
        self._read = 0

    def batch(self, number: int, part: int = 0, parts: int = 1) -> Rows:
        """One of the equal parts of batch 1, 2, …, rows [batch_rows/parts].

        Where a source cannot seek, whole batches in ascending order; those that nobody asks for are read over.
        """
        if not self.seeks:
            assert parts == 1 and number > self._read, f"batch {number}, part of {parts}, after {self._read}"
            for passed in range(self._read + 1, number):
                self._rows(passed, 0, 1)
            self._read = number
        return self._rows(number, part, parts)

    def _rows(self, number: int, part: int, parts: int) -> Rows:
        first = (number - 1) * self.batch_rows
        start, stop = (first + self.batch_rows * i // parts for i in (part, part + 1))
        places, numbers = self._mixture.places(start, stop)
        used = np.unique(places)
        if len(used) == 1:
            return self.sources[used[0]].rows(numbers)
        found = [(np.flatnonzero(places == i), self.sources[i].rows(numbers[places == i])) for i in used]
        order = np.argsort(np.concatenate([here for here, _ in found]))
        return Rows(*(np.concatenate(kind)[order] for kind in zip(*(rows for _, rows in found), strict=True)))

    def rows(self, batches: int) -> dict[str, int]:
        """How many rows of each source, by its name, the first so many batches have."""
        counts = self._mixture.counts(batches * self.batch_rows)
        return {source.name: int(n) for source, n in zip(self.sources, counts, strict=True)}

    def epochs(self, batches: int) -> dict[str, float]:
        """Passes over each source, by its name, that the first so many batches make."""
        rows = self.rows(batches)
        return {source.name: source.epochs(rows[source.name]) for source in self.sources}

    def state(self) -> dict[str, Any]:
        """Where the sources that cannot seek stand: JSON."""
        streams = {source.name: source.state() for source in self.sources if not source.seeks}
        return {"batches": self._read, "streams": streams}

    def load_state(self, state: dict[str, Any]) -> None:
        self._read = state["batches"]
        for source in self.sources:
            if not source.seeks:
                source.load_state(state["streams"][source.name])

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must not change while a run goes on: JSON."""
        return {source.name: source.fingerprint() for source in self.sources}


def _open(source: SourceConfig, config: Config) -> Source:
    train, vocab_size = config.train, config.model.n_tokens
    if source.path is not None:
        return ShardSource(source.path, train.seq_len, vocab_size, train.seed, config.data.document_mask)
    from nlm.data.stream import StreamSource  # an optional extra, imported only when chosen

    assert source.files is not None and source.tokenizer is not None, "checked with the config"
    return StreamSource(
        source.files,
        source.tokenizer,
        train.seq_len,
        vocab_size,
        train.seed,
        text_field=source.text_field,
        shuffle=source.shuffle,
        workers=source.workers,
    )
