"""The shapes of microbatches: the largest that can come."""

from typing import NamedTuple

from nlm.config import Config, TranslationConfig
from nlm.data.pairs import multiple


class Shape(NamedTuple):
    """On each data parallel rank: how many rows, of how many tokens of the target and, beside, of a source."""

    rows: int
    target: int
    source: int = 0

    @property
    def tokens(self) -> int:
        """Of the target."""
        return self.rows * self.target


def shapes(config: Config) -> list[Shape]:
    """All are of one shape, but for batches of pairs. Of these, rows are the longest that can come or, where sources
    and targets differ in that, as many as can come with both sides full."""
    lengths = (config.train.seq_len, config.source_len) if config.model.reads_source else (config.train.seq_len,)
    if not isinstance(config.data.train, TranslationConfig):
        return [Shape(config.batch_rows // multiple(config), *lengths)]
    widths = lengths, (min(lengths), min(lengths))
    found = (Shape(-(-(config.train.batch_tokens // max(sides)) // multiple(config)), *sides) for sides in widths)
    return list(dict.fromkeys(found))
