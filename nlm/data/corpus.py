"""The training data of a config: its sources, mixed, one batch a step."""

from functools import cached_property
from typing import Any

import numpy as np

from nlm.config import Config, SourceConfig
from nlm.data.mixture import Mixture
from nlm.data.source import Rows, ShardSource, Source


class Corpus:
    """Batches of rows, of which each is a function of (config, step); of streams, given that all before were read.

    Errors: ValueError for data that is missing, damaged, too short or not the vocabulary's.
    """

    def __init__(self, config: Config) -> None:
        self.batch_rows = config.batch_rows
        self.sources = [_open(source, config) for source in config.data.sources]
        weights = [source.weight for source in config.data.sources]
        sizes = [source.n_tokens for source in self.sources if isinstance(source, ShardSource)]
        self._mixture = Mixture([w for w in weights if w is not None] or sizes, config.train.seed)
        self.seeks = all(source.seeks for source in self.sources)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Rows:
        """One of the equal parts of the batch of `step` (1, 2, …), rows [batch_rows/parts]."""
        first = (step - 1) * self.batch_rows
        start, stop = (first + self.batch_rows * i // parts for i in (part, part + 1))
        places, numbers = self._mixture.places(start, stop)
        used = np.unique(places)
        if len(used) == 1:
            return self.sources[used[0]].rows(numbers)
        found = [(np.flatnonzero(places == i), self.sources[i].rows(numbers[places == i])) for i in used]
        order = np.argsort(np.concatenate([here for here, _ in found]))
        return Rows(*(np.concatenate(kind)[order] for kind in zip(*(rows for _, rows in found), strict=True)))

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each source, by its name, that the batches up to that of `step` make."""
        counts = self._mixture.counts(step * self.batch_rows)
        return {source.name: source.epochs(int(n)) for source, n in zip(self.sources, counts, strict=True)}

    def state(self) -> dict[str, Any]:
        """Where the sources that cannot seek stand: JSON."""
        return {source.name: source.state() for source in self.sources if not source.seeks}

    def load_state(self, state: dict[str, Any]) -> None:
        for source in self.sources:
            if not source.seeks:
                source.load_state(state[source.name])

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must not change while a run goes on: JSON."""
        return {source.name: source.fingerprint() for source in self.sources}


def _open(source: SourceConfig, config: Config) -> Source:
    train, vocab_size = config.train, config.model.vocab_size
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
