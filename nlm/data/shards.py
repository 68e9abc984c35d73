"""Token shards on disk, a stream [n_tokens] and its documents: Megatron's pair PREFIX.bin and PREFIX.idx.

The `.bin` is the bare tokens. The `.idx` is, little-endian: magic, u64 version 1, u8 dtype code, u64 n, u64
m, int32 lengths [n] of sequences in tokens, int64 offsets [n] of sequences in bytes, int64 boundaries [m]:
document i is sequences boundaries[i] to boundaries[i+1]. (megatron-core 0.16, `indexed_dataset.py`.)
A `PREFIX.json` beside them, which `nlm tokenize` writes, states facts that would otherwise take a scan.
"""

import json
import os
import struct
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from io import BufferedRandom, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, final

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which are no ids
INT32, UINT16 = 4, 8

SCAN_TOKENS = 1 << 24
CHECKED = 1 << 20  # entries of an index at a time
LONG_SCAN = 1 << 28  # more tokens than are scanned before training: a second's worth


def shard_path(prefix: str | Path, suffix: str) -> Path:
    """The shard's file with this suffix, such as `.json`; `prefix` may itself end in .bin or .idx."""
    return Path(str(prefix).removesuffix(".bin").removesuffix(".idx") + suffix)


class Saved(NamedTuple):
    """How much of a shard is written, and a checksum of its tokens' bytes."""

    documents: int = 0
    tokens: int = 0
    crc32: int = 0


@final
class ShardWriter:
    """Context manager that writes PREFIX.bin and PREFIX.idx, whole on a clean exit, not at all otherwise.

    Tokens are uint16 when `vocab_size` <= 65500, else int32. What was saved before an error is kept beside them, and a
    writer that is told how much that was goes on there.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, saved: Saved = Saved()) -> None:  # noqa: B008
        """`saved`: what is there already, as `save` gave it."""
        self.vocab_size = vocab_size
        self._code = UINT16 if vocab_size <= 65500 else INT32
        self._dtype = np.dtype(DTYPES[self._code])
        self._prefix = prefix
        self._partial = {suffix: shard_path(prefix, f"{suffix}.partial") for suffix in (".bin", ".lengths", ".idx")}
        self._saved = self._written = saved

    def __enter__(self) -> Self:
        self._partial[".bin"].parent.mkdir(parents=True, exist_ok=True)
        documents, tokens, _ = self._saved
        self._bin = _open_at(self._partial[".bin"], tokens * self._dtype.itemsize)
        self._lengths = _open_at(self._partial[".lengths"], documents * 4)
        return self

    def add_document(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """[n_tokens] ids of one document, its end-of-document id included; errors as of `add_documents`."""
        self.add_documents(np.asarray(ids), [len(ids)])

    def add_documents(self, tokens: NDArray[np.integer], lengths: Sequence[int] | NDArray[np.integer]) -> None:
        """[n_tokens] ids of documents of these lengths, one behind the other.

        Errors: ValueError for ids that are not integers in range(vocab_size), or a document of 2**31 tokens, which
        the format cannot hold.
        """
        documents, n_tokens, crc32 = self._written
        if tokens.size and (tokens.ndim != 1 or tokens.dtype.kind not in "iu"):
            raise ValueError(f"a document is a list of integer ids, got {tokens.dtype} {tokens.shape}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(
                f"document {documents}: expected ids in range({self.vocab_size}), "
                f"got {tokens.min()} to {tokens.max()}; give the vocab_size of the tokenizer that made them"
            )
        if (longest := max(lengths, default=0)) >= 1 << 31:
            raise ValueError(f"document {documents}: expected fewer than 2**31 tokens, got {longest}; divide it")
        stored = tokens.astype(self._dtype)
        stored.tofile(self._bin)
        np.asarray(lengths, "<i4").tofile(self._lengths)
        crc32 = zlib.crc32(stored.data, crc32)
        self._written = Saved(documents + len(lengths), n_tokens + tokens.size, crc32)

    def save(self) -> Saved:
        """Makes what is written so far safe from a crash -> how much that is."""
        _sync(self._bin)
        _sync(self._lengths)
        self._saved = self._written
        return self._saved

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._bin, self._lengths:
                if kind is not None:
                    return
                self.save()
            with open(self._partial[".idx"], "wb") as idx:
                idx.write(self._index(np.fromfile(self._partial[".lengths"], "<i4")))
                _sync(idx)
            # The old index and facts go first: never may they stand beside the new tokens.
            for stale in (".idx", ".json"):
                shard_path(self._prefix, stale).unlink(missing_ok=True)
            for suffix in ".bin", ".idx":
                os.replace(self._partial[suffix], shard_path(self._prefix, suffix))
            self._saved = Saved()
        finally:
            if not any(self._saved):
                for partial in self._partial.values():
                    partial.unlink(missing_ok=True)

    def _index(self, lengths: NDArray[np.int32]) -> bytes:
        offsets = (_starts(lengths)[:-1] * self._dtype.itemsize).astype("<i8")
        boundaries = np.arange(len(lengths) + 1, dtype="<i8")  # one sequence a document
        header = HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(boundaries))
        return header + lengths.tobytes() + offsets.tobytes() + boundaries.tobytes()


@final
class TokenShard:
    """Memory-mapped reader of PREFIX.bin and PREFIX.idx. `tokens` is the whole stream [n_tokens].

    Opening reads and checks the index, never the tokens.

    Errors: ValueError for a missing file, a broken index, a `.bin` of another size than the index says, or no
    tokens at all.
    """

    def __init__(self, prefix: str | Path) -> None:
        self._prefix = prefix
        bin_path, idx_path = shard_path(prefix, ".bin"), shard_path(prefix, ".idx")
        for path, other in (bin_path, idx_path), (idx_path, bin_path):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; a token shard is {bin_path.name} and {idx_path.name}"
                    f"{', of which only one is there' if other.is_file() else ''}; make both with "
                    f"`nlm tokenize INPUT… --tokenizer SPEC --out {shard_path(prefix, '')}`"
                )
        dtype, lengths, self._offsets, self._boundaries = _read_index(idx_path)
        self.n_tokens = int(lengths.sum(dtype=np.int64))
        self.n_documents = len(self._boundaries) - 1
        expected, actual = self.n_tokens * dtype.itemsize, bin_path.stat().st_size
        if actual != expected:
            raise ValueError(
                f"{bin_path}: {idx_path.name} expects {expected} bytes ({self.n_tokens} tokens of {dtype}), "
                f"found {actual}; the files are not a pair or a copy was cut short: copy or tokenize again"
            )
        if self.n_tokens == 0:
            raise ValueError(f"{bin_path}: empty corpus, 0 tokens; tokenize inputs that hold text")
        self.tokens: NDArray[np.integer] = np.memmap(bin_path, dtype, mode="r", shape=(self.n_tokens,))

    def document(self, i: int) -> NDArray[np.integer]:
        """[n_tokens] of document i, a view of the stream.

        Errors: ValueError for i outside range(n_documents).
        """
        if not 0 <= i < self.n_documents:
            raise ValueError(f"expected a document in range({self.n_documents}), got {i}")
        return self.tokens[self._start(i) : self._start(i + 1)]

    def lengths(self) -> NDArray[np.int64]:
        """[n_documents], in tokens."""
        starts = np.append(self._offsets // self.tokens.itemsize, self.n_tokens)
        return np.diff(starts[self._boundaries])

    def starts(self, first: int, last: int) -> NDArray[np.int64]:
        """The places in first … last-1 of the stream at which a document starts, in order."""
        documents = range(self.n_documents)
        low = bisect_left(documents, first, key=self._start)
        high = bisect_left(documents, last, low, key=self._start)
        return np.array([self._start(i) for i in documents[low:high]], np.int64)

    def _start(self, document: int) -> int:
        sequence = self._boundaries[document]
        return int(self._offsets[sequence]) // self.tokens.itemsize if sequence < len(self._offsets) else self.n_tokens

    def facts(self) -> dict[str, Any]:
        """What PREFIX.json states, if that agrees with the index, else nothing."""
        facts = shard_facts(self._prefix)
        return facts if (facts.get("tokens"), facts.get("documents")) == (self.n_tokens, self.n_documents) else {}

    def max_token(self) -> int | None:
        """The largest id, as stated by PREFIX.json or found by a scan; None where that would take long."""
        if (stated := self.facts().get("max_token")) is not None:
            return int(stated)
        if self.n_tokens > LONG_SCAN:
            return None
        return max(int(self.tokens[i : i + SCAN_TOKENS].max()) for i in range(0, self.n_tokens, SCAN_TOKENS))


def shard_facts(prefix: str | Path) -> dict[str, Any]:
    """What PREFIX.json states; nothing if there is none, or it is something else's file."""
    try:
        facts = json.loads(shard_path(prefix, ".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """The dtype of the tokens, lengths and offsets [n] of sequences, and the boundaries [m] of documents."""
    again = "copy it again, or make it with `nlm tokenize`"
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    magic = header[: len(MAGIC)]
    if magic != MAGIC[: len(header)]:
        raise ValueError(f"{path}: expected the magic bytes {MAGIC!r}, got {magic!r}; {again}")
    if size < HEADER.size:
        raise ValueError(f"{path}: truncated: expected at least {HEADER.size} bytes, found {size}; {again}")
    _, version, code, n, m = HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {version}; {again}")
    if code not in DTYPES:
        raise ValueError(f"{path}: expected an integer dtype's code, one of {[*DTYPES]}, got {code}; {again}")
    if size < (expected := HEADER.size + 12 * n + 8 * m):
        counts = f"{n} sequences, {m} boundaries"
        raise ValueError(f"{path}: truncated: expected {expected} bytes ({counts}), found {size}; {again}")
    index = np.memmap(path, np.uint8, mode="r")
    lengths = np.frombuffer(index, "<i4", n, HEADER.size)
    offsets = np.frombuffer(index, "<i8", n, HEADER.size + 4 * n)
    boundaries = np.frombuffer(index, "<i8", m, HEADER.size + 12 * n)
    dtype = np.dtype(DTYPES[code])
    if (n and offsets[0]) or not all(_follow(lengths[i:], offsets[i:], dtype.itemsize) for i in range(0, n, CHECKED)):
        raise ValueError(f"{path}: expected sequences that follow one another in the .bin; {again}")
    if m == 0 or boundaries[0] != 0 or boundaries[-1] > n or (np.diff(boundaries) < 0).any():
        raise ValueError(f"{path}: expected document boundaries that rise from 0 to {n}; {again}")
    return dtype, lengths, offsets, boundaries


def _follow(lengths: NDArray[np.int32], offsets: NDArray[np.int64], itemsize: int) -> bool:
    """Whether the first CHECKED sequences, and the one after, stand one behind the other."""
    ends = offsets[:CHECKED] + lengths[:CHECKED].astype(np.int64) * itemsize
    return bool((lengths[:CHECKED] >= 0).all() and (ends[: len(offsets) - 1] == offsets[1 : CHECKED + 1]).all())


def _starts(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """[n] -> [n+1], where each sequence starts, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _open_at(path: Path, size: int) -> BufferedRandom:
    """For writing on after the first `size` bytes. Errors: OSError when there are fewer."""
    file = open(path, "r+b" if size else "w+b")  # noqa: SIM115, the writer closes it
    file.truncate(file.seek(size))
    return file


def _sync(file: BufferedRandom | BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
