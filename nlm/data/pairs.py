"""Pairs of texts to translate, in batches of like length.

A source is the tag of the target's language, the text and its end (Johnson et al. 2017, arXiv:1611.04558: one model for
all directions, told by a token in front); a target begins with the end of a text, as if one stood before it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nlm.config import PAIR_WIDTH, Config, TranslationConfig
from nlm.data.mixture import BLOCK, Mixture
from nlm.data.order import Permutation
from nlm.data.shards import TokenShard, shard_facts
from nlm.data.source import shard_fingerprint
from nlm.data.tokenizer import Ids

Numbers = NDArray[np.int64]
Picked = tuple[Numbers, Numbers]
"""Pairs [n]: of each its direction, and the how-manieth of that it is."""


class PairRows(NamedTuple):
    """Sources [B T] and targets [B S+1], the end of a text before each; both filled up."""

    source: NDArray[np.int64]
    tokens: NDArray[np.int64]


def source_ids(text: Ids, tag: int, eod: int, limit: int) -> Ids:
    """Of a text [n], what an encoder reads, cut to `limit` tokens."""
    return np.concatenate([[tag], text[: limit - 2], [eod]]).astype(np.int32)


@final
class Pairs:
    """The pairs of shards PATH.de and so on that are no longer than a row; each is the how-manieth of a direction.
    `padding`, which fills up rows, is above all tokens.

    Errors: ValueError for missing or damaged shards, those that were not written together, tokens that are not below
    `padding`, or a direction without pairs.
    """

    def __init__(
        self, path: str, pairs: Sequence[tuple[str, str]], source_len: int, target_len: int, padding: int
    ) -> None:
        self.path, self.padding, self._limits = path, padding, (source_len, target_len)
        languages = sorted({language for pair in pairs for language in pair})
        self._shards = {language: TokenShard(f"{path}.{language}") for language in languages}
        facts = {language: shard_facts(f"{path}.{language}") for language in languages}
        for language, shard in self._shards.items():
            if "tag" not in facts[language]:
                raise ValueError(f"{path}.{language}.json: expected a tag; see `nlm tokenize --languages`")
            largest = max(shard.max_token() or 0, facts[language]["tag"])
            if largest >= padding:
                raise ValueError(
                    f"model.vocab_size: expected more than {largest + 1}, where {largest} is a token of "
                    f"{path}.{language}, got {padding + 1}; set it to one more than the tokenizer's size"
                )
        same = {(shard.n_documents, facts[name]["tokenizer_sha256"]) for name, shard in self._shards.items()}
        if len(same) > 1:
            raise ValueError(
                f"{path}: expected as many documents in each language, of one tokenizer, got {sorted(same)}; "
                "tokenize all languages with one command"
            )
        self._tags: dict[str, int] = {language: facts[language]["tag"] for language in languages}
        self._eod: int = facts[languages[0]]["eod"]
        lengths = {language: shard.lengths() for language, shard in self._shards.items()}

        self.directions = [f"{source}-{target}" for source, target in pairs]
        self._pairs = list(pairs)
        self._documents: list[Numbers] = []
        self._lengths: list[Numbers] = []  # [2 n]
        self.too_long = 0
        for name, (source, target) in zip(self.directions, pairs, strict=True):
            sources, targets = lengths[source] + 1, lengths[target]
            whole = (sources > 2) & (targets > 1)
            fits = whole & (sources <= source_len) & (targets <= target_len)
            if not fits.any():
                raise ValueError(
                    f"{path}: expected pairs {name} of at most {source_len} and {target_len} tokens, found none; leave "
                    "the direction out of data.train.directions, or raise train.seq_len"
                )
            self.too_long += int(whole.sum() - fits.sum())
            self._documents.append(np.flatnonzero(fits))
            self._lengths.append(np.stack([sources[fits], targets[fits]]))

    @property
    def sizes(self) -> Numbers:
        """[directions]: how many pairs each has."""
        return np.array([len(documents) for documents in self._documents])

    def cut(self, directions: Numbers, numbers: Numbers, batch_tokens: int) -> list[Picked]:
        """Pairs [n] -> batches of like length, in which no side, filled up, has more than `batch_tokens`."""
        source, target = map(_filled, self._sizes(directions, numbers), self._limits)
        longer = np.maximum(source, target)
        order = np.lexsort((source + target, longer))
        width = longer[order]
        batches, start = [], 0
        while start < len(order):
            most = width[start : start + max(1, batch_tokens // int(width[start]))]
            full = np.arange(1, len(most) + 1) * most
            stop = start + max(1, int(np.searchsorted(full, batch_tokens, "right")))
            batches.append((directions[order[start:stop]], numbers[order[start:stop]]))
            start = stop
        return batches

    def rows(self, directions: Numbers, numbers: Numbers, part: int = 0, parts: int = 1, multiple: int = 1) -> PairRows:
        """One of the equal parts of a batch, to which empty rows are added that make it a multiple."""
        widths = map(_filled, (sizes.max() for sizes in self._sizes(directions, numbers)), self._limits)
        source_width, target_width = map(int, widths)
        n = -(-len(numbers) // multiple) * multiple
        start, stop = (n * i // parts for i in (part, part + 1))
        source = np.full((stop - start, source_width), self.padding, np.int64)
        tokens = np.full((stop - start, target_width + 1), self.padding, np.int64)
        source[:, 0] = self._eod  # of an empty row, lest there be nothing to attend to
        for row, (direction, number) in enumerate(zip(directions[start:stop], numbers[start:stop], strict=True)):
            read, target = self.pair(int(direction), int(number))
            source[row, : len(read)] = read
            tokens[row, 0] = self._eod
            tokens[row, 1 : len(target) + 1] = target
        return PairRows(source, tokens)

    def pair(self, direction: int, number: int) -> tuple[Ids, Ids]:
        """What the encoder reads, and the target with its end."""
        document = int(self._documents[direction][number])
        text, target = (self._shards[language].document(document) for language in self._pairs[direction])
        return np.concatenate([[self._tags[self._pairs[direction][1]]], text]).astype(np.int32), target.astype(np.int32)

    def _sizes(self, directions: Numbers, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Of pairs [n], the tokens of the sources and of the targets [n]."""
        sizes = np.empty((2, len(numbers)), np.int64)
        for i, of_direction in enumerate(self._lengths):
            here = directions == i
            sizes[:, here] = of_direction[:, numbers[here]]
        return sizes[0], sizes[1]

    def fingerprint(self) -> dict[str, Any]:
        return {
            language: shard_fingerprint(f"{self.path}.{language}", shard) for language, shard in self._shards.items()
        }


@final
class PairCorpus:
    """As Corpus, of pairs: they are drawn from all directions by `temperature`, p ∝ n^(1/T) for n pairs (Arivazhagan et
    al. 2019, arXiv:1907.05019, section 4), each direction in an order of its own every epoch; so many at a time as make
    a pass, at most BLOCK, are sorted by length and cut into batches, which come in a random order.

    Errors: as of Pairs.
    """

    seeks = True

    def __init__(self, config: Config) -> None:
        choice, train = config.data.train, config.train
        assert isinstance(choice, TranslationConfig), "Corpus has the others"
        self.pairs = pairs_of(config, choice.path)
        self._seed, self._batch_tokens = train.seed, train.batch_tokens
        self._multiple = multiple(config)
        self._mixture = Mixture((self.pairs.sizes ** (1 / choice.temperature)).tolist(), train.seed)
        self._window = min(BLOCK, int(self.pairs.sizes.sum()))
        self._ends = [0]  # of how many batches the windows before have
        self._cached: tuple[int, list[Picked]] = (-1, [])

    @property
    def said(self) -> str:
        pairs, dropped = self.pairs, f"{self.pairs.too_long:,} longer than a row left out"
        return f"{pairs.path}: {pairs.sizes.sum():,} pairs in {len(pairs.sizes)} directions, {dropped}"

    def batch(self, number: int, part: int = 0, parts: int = 1) -> PairRows:
        """One of the equal parts of batch 1, 2, …; of all, no side has more than batch_tokens but for empty rows."""
        window, place = self._find(number)
        return self.pairs.rows(*self._batches(window)[place], part, parts, self._multiple)

    def rows(self, batches: int) -> dict[str, int]:
        """How many pairs of each direction the first so many batches have."""
        window, place = self._find(batches + 1)
        counts = self._mixture.counts(window * self._window)
        for directions, _ in self._batches(window)[:place]:
            counts = counts + np.bincount(directions, minlength=len(counts))
        return {name: int(n) for name, n in zip(self.pairs.directions, counts, strict=True)}

    def epochs(self, batches: int) -> dict[str, float]:
        """Passes over the pairs of each direction that the first so many batches make."""
        return {name: n / size for (name, n), size in zip(self.rows(batches).items(), self.pairs.sizes, strict=True)}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert not state, "it has none"

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.pairs.fingerprint()

    def _find(self, number: int) -> tuple[int, int]:
        """The window of a batch, and its place in it."""
        while self._ends[-1] < number:
            self._ends.append(self._ends[-1] + len(self._batches(len(self._ends) - 1)))
        window = int(np.searchsorted(self._ends, number)) - 1
        return window, number - 1 - self._ends[window]

    def _batches(self, window: int) -> list[Picked]:
        if self._cached[0] != window:
            directions, drawn = self._mixture.places(window * self._window, (window + 1) * self._window)
            numbers = np.empty_like(drawn)
            for i, size in enumerate(self.pairs.sizes.tolist()):
                here = np.flatnonzero(directions == i)
                epochs, places = np.divmod(drawn[here], size)
                for epoch in np.unique(epochs):
                    inside = here[epochs == epoch]
                    numbers[inside] = Permutation(size, (self._seed, i, int(epoch)))(places[epochs == epoch])
            self._cached = window, shuffled(self.pairs.cut(directions, numbers, self._batch_tokens), self._seed, window)
        return self._cached[1]


def pairs_of(config: Config, path: str) -> Pairs:
    """At `path`, those of the directions of the training data; padding is the last token of the vocabulary."""
    choice = config.data.train
    assert isinstance(choice, TranslationConfig), "Corpus has the others"
    return Pairs(path, choice.pairs, config.source_len, config.train.seq_len, config.model.padding)


def multiple(config: Config) -> int:
    """Of how many rows the batch is a multiple, so that ranks and microbatches have equal parts."""
    return config.parallel.data_ranks * config.parallel.microbatches


def shuffled(batches: list[Picked], *seed: int) -> list[Picked]:
    return [batches[i] for i in Permutation(len(batches), seed)(np.arange(len(batches)))]


def _filled(lengths: Any, limit: int) -> Any:
    """Up to a multiple of PAIR_WIDTH, but for those that are near the limit."""
    return np.minimum(-(-lengths // PAIR_WIDTH) * PAIR_WIDTH, limit)
