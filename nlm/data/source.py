"""Sources of training rows that can seek: token shards on disk, one or a directory of them."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import numpy as np
from numpy.typing import NDArray

from nlm.data.order import Permutation
from nlm.data.shards import TokenShard, shard_path

PROBES, PROBE_TOKENS = 64, 4096
"""What a fingerprint reads of the tokens: so many places, so many tokens at each."""


class Rows(NamedTuple):
    """Tokens [B S+1], inputs and their targets, and where among them a document starts [B S+1]."""

    tokens: NDArray[np.int64]
    starts: NDArray[np.bool_]


class Source(Protocol):
    """An endless sequence of rows, in its own order, begun anew whenever the corpus is through."""

    name: str
    seeks: bool
    """Whether any row can be asked for; if not, they come one after another."""

    def rows(self, numbers: NDArray[np.int64]) -> Rows:
        """Rows number [n], n of them, from 0.

        Errors: ValueError for tokens that the vocabulary does not have.
        """
        ...

    def epochs(self, rows: int) -> float:
        """Passes over the corpus that so many rows make."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What must not change while a run goes on: JSON."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the next row is, if it cannot seek: JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where a source of the same corpus stood."""
        ...


@final
class ShardSource:
    """Row i of a shard is its tokens i·S to (i+1)·S, both included; what is left over at its end fills no row.

    Each epoch has an order of its own, over all shards together, a function of (seed, epoch).

    Errors: ValueError for a missing, damaged or empty shard, a directory without any, a corpus shorter than a row, or
    one with tokens outside range(vocab_size).
    """

    seeks = True

    def __init__(self, path: str, seq_len: int, vocab_size: int, seed: int, document_mask: bool) -> None:
        self.name, self._seq_len, self._vocab_size, self._seed = path, seq_len, vocab_size, seed
        self._mask = document_mask
        self._prefixes = prefixes(path)
        self._shards = [TokenShard(prefix) for prefix in self._prefixes]
        for prefix, shard in zip(self._prefixes, self._shards, strict=True):
            if (largest := shard.max_token()) is not None:
                self._require(largest, prefix)
        self._ends = np.cumsum([(shard.n_tokens - 1) // seq_len for shard in self._shards])
        self.n_tokens = sum(shard.n_tokens for shard in self._shards)
        self.n_rows = int(self._ends[-1])
        if self.n_rows == 0:
            raise ValueError(
                f"{path}: expected at least seq_len+1 = {seq_len + 1} tokens, got {self.n_tokens}; "
                "shorten train.seq_len or give a larger corpus"
            )

    def rows(self, numbers: NDArray[np.int64]) -> Rows:
        epochs, places = np.divmod(numbers, self.n_rows)
        order = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            order[inside] = Permutation(self.n_rows, (self._seed, int(epoch)))(places[inside])
        return self.in_order(order)

    def in_order(self, rows: NDArray[np.int64]) -> Rows:
        """Rows [n] of the corpus, as it stands on the disk."""
        shards = np.searchsorted(self._ends, rows, "right")
        width = self._seq_len + 1
        tokens = np.empty((len(rows), width), np.int64)
        starts = np.zeros((len(rows), width), np.bool_)
        for i in np.unique(shards):
            shard, here = self._shards[i], np.flatnonzero(shards == i)
            firsts = (rows[here] - (self._ends[i - 1] if i else 0)) * self._seq_len
            found = np.lib.stride_tricks.sliding_window_view(shard.tokens, width)[firsts]
            self._require(int(found.max()), self._prefixes[i])
            tokens[here] = found
            if self._mask:
                for row, first in zip(here, firsts.tolist(), strict=True):
                    starts[row, shard.starts(first, first + width) - first] = True
        return Rows(tokens, starts)

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text that all tokens were, where the shards state it."""
        stated = [facts["bytes"] for shard in self._shards if "bytes" in (facts := shard.facts())]
        return sum(stated) / self.n_tokens if len(stated) == len(self._shards) else None

    def epochs(self, rows: int) -> float:
        return rows / self.n_rows

    def fingerprint(self) -> dict[str, Any]:
        shards = zip(self._prefixes, self._shards, strict=True)
        return {str(prefix): shard_fingerprint(prefix, shard) for prefix, shard in shards}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert not state, "it has none"

    def _require(self, largest: int, prefix: Path) -> None:
        if largest >= self._vocab_size:
            raise ValueError(
                f"model.vocab_size: expected more than {largest}, a token in {prefix}, got {self._vocab_size}; "
                "set it to the tokenizer's size, for an encoder to one more"
            )


def prefixes(path: str) -> list[Path]:
    """The shards at `path`: the one of that prefix, or all pairs in a directory, sorted.

    Errors: ValueError for a directory without any.
    """
    if not Path(path).is_dir() or shard_path(path, ".idx").exists():
        return [shard_path(path, "")]
    if found := sorted(file.with_suffix("") for file in Path(path).glob("*.idx")):
        return found
    raise ValueError(f"{path}: expected pairs of .bin and .idx in this directory, found none; see `nlm tokenize`")


def shard_fingerprint(prefix: str | Path, shard: TokenShard) -> dict[str, Any]:
    """What must not change of a shard while a run goes on: JSON."""
    return {
        "tokens": shard.n_tokens,
        "index": _sha256(shard_path(prefix, ".idx")),
        "sampled": _sampled(shard.tokens),
        "tokenizer": shard.facts().get("tokenizer_sha256"),
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled(tokens: NDArray[np.integer]) -> str:
    """[n_tokens] -> a hash of some of them: all could be terabytes."""
    digest = hashlib.sha256()
    for first in np.linspace(0, max(len(tokens) - PROBE_TOKENS, 0), PROBES, dtype=np.int64):
        digest.update(tokens[first : first + PROBE_TOKENS].tobytes())
    return digest.hexdigest()
