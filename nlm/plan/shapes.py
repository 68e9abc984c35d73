"""The shapes of microbatches: the largest that can come."""

from typing import NamedTuple

from nlm.config import Config
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
    """All are of one shape, but for batches of pairs, of which either the rows are the longest or there are as many as
    both sides can fill: between the two, what is taken by tokens and by pairs of tokens is a convex function of the
    length, so that one of them takes most."""
    lengths = (config.train.seq_len, config.source_len) if config.model.reads_source else (config.train.seq_len,)
    if not config.data.has_pairs:
        return [Shape(config.batch_rows // multiple(config), *lengths)]
    found = []
    for sides in (lengths, (min(lengths), min(lengths))):
        rows = max(1, config.train.batch_tokens // max(sides))
        found.append(Shape(-(-rows // multiple(config)), *sides))
    return list(dict.fromkeys(found))
