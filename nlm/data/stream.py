"""Sources of training rows that cannot seek: text, local or remote, tokenized as it comes in.

Files are read by Hugging Face `datasets` in streaming mode, an extra (`pip install 'nlm[stream]'`).
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Iterator
from glob import glob
from pathlib import PurePosixPath
from typing import Any, NamedTuple, final

import datasets
import numpy as np
from numpy.typing import NDArray

from nlm.data.encode import encode_in_order
from nlm.data.order import Permutation
from nlm.data.source import Rows
from nlm.data.tokenizer import Ids, Tokenizer, load_tokenizer, tokenizer_sha256

CHUNK_CHARS = 1 << 20  # of text that is encoded together
RETRY_S: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)  # how long to wait before a remote file is tried again
KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".parquet": "parquet"}
PACKED = {".gz", ".zst", ".bz2", ".xz"}

State = dict[str, Any]
"""Where a stream stands: JSON."""


class Chunk(NamedTuple):
    """Encoded documents, one behind the other, and where the stream stood before them."""

    before: State
    tokens: Ids
    starts: NDArray[np.bool_]


@final
class StreamSource:
    """Rows packed from documents in their order: S+1 tokens each, the last of which begins the next row.

    `shuffle` rows at a time are given in an order drawn from (seed, how-manieth such block). The state names the
    chunk of text in which the current block begins and the tokens of it that are used up, so that a run goes on with
    exactly the next token, whatever the number of workers; up to a block and a chunk are read again.

    Errors: ValueError for files that cannot be read or hold no text, and a tokenizer larger than the vocabulary.
    """

    seeks = False

    def __init__(
        self,
        files: list[str],
        tokenizer: str,
        seq_len: int,
        vocab_size: int,
        seed: int,
        *,
        text_field: str = "text",
        shuffle: int = 1,
        workers: int = 0,
    ) -> None:
        self.name = files[0] if len(files) == 1 else f"{files[0]} …"
        self._files, self._tokenizer, self._text_field = files, tokenizer, text_field
        self._seq_len, self._seed, self._shuffle, self._workers = seq_len, seed, shuffle, workers
        self._kind = _kind(files)
        coder = load_tokenizer(tokenizer)
        if coder.vocab_size > vocab_size:
            raise ValueError(
                f"model.vocab_size: expected at least {coder.vocab_size}, the size of {tokenizer}, got {vocab_size}"
            )
        self._eod = coder.eod
        self.load_state({"epoch": 0, "dataset": None, "used": 0, "blocks": 0, "row": 0})

    def rows(self, numbers: NDArray[np.int64]) -> Rows:
        """The next rows, which `numbers` must name."""
        came = self._blocks * self._shuffle + self._row
        assert numbers.tolist() == list(range(came, came + len(numbers))), "a stream cannot seek"
        rows = [self._next() for _ in numbers]
        return Rows(np.stack([row.tokens for row in rows]), np.stack([row.starts for row in rows]))

    def epochs(self, rows: int) -> float:
        """Whole passes only: how long a stream is shows at its end."""
        return float(self._position["epoch"])

    def fingerprint(self) -> dict[str, Any]:
        """With the sizes of local files; of remote ones there are only the names."""
        found = sorted(path for pattern in self._files for path in glob(pattern, recursive=True))
        return {
            "files": self._files,
            "bytes": {path: os.path.getsize(path) for path in found},
            "text_field": self._text_field,
            "tokenizer": tokenizer_sha256(self._tokenizer),
        }

    def state(self) -> State:
        """Where the next row is to be had."""
        position = self._position if self._block else self._here()
        return position | {"blocks": self._blocks, "row": self._row}

    def load_state(self, state: State) -> None:
        """Goes on where a source of the same files stood."""
        self._blocks, self._row, self._used = state["blocks"], state["row"], state["used"]
        self._position = {key: state[key] for key in ("epoch", "dataset", "used")}
        self._chunks = self._read(state["epoch"], state["dataset"])
        self._window: deque[Chunk] = deque()
        self._block: list[Rows] = []

    def _next(self) -> Rows:
        if not self._block:
            self._position = self._here()
            self._block = [self._pack() for _ in range(self._shuffle)]
            self._order = Permutation(self._shuffle, (self._seed, self._blocks))(np.arange(self._shuffle))
        row = self._block[self._order[self._row]]
        self._row += 1
        if self._row == self._shuffle:
            self._block, self._row, self._blocks = [], 0, self._blocks + 1
        return row

    def _here(self) -> State:
        """The chunk that holds the next token, and how many of its tokens are used up."""
        if not self._window:
            self._window.append(next(self._chunks))
        return self._window[0].before | {"used": self._used}

    def _pack(self) -> Rows:
        """The next S+1 tokens, of which S are used up."""
        tokens, starts, first, missing = [], [], self._used, self._seq_len + 1
        for i in itertools.count():
            if i == len(self._window):
                self._window.append(next(self._chunks))
            tokens.append(self._window[i].tokens[first : first + missing])
            starts.append(self._window[i].starts[first : first + missing])
            first, missing = 0, missing - len(tokens[-1])
            if not missing:
                break
        self._used += self._seq_len
        while self._used >= len(self._window[0].tokens):
            self._used -= len(self._window.popleft().tokens)
        return Rows(np.concatenate(tokens).astype(np.int64), np.concatenate(starts))

    def _read(self, epoch: int, state: State | None) -> Iterator[Chunk]:
        """Pass after pass over the files, from where a dataset's state says."""
        while True:
            chunks = 0
            texts = self._texts(state)
            for (before, _), documents in encode_in_order(_encode, texts, self._tokenizer, self._workers):
                if documents := [document for document in documents if document.size]:
                    starts = np.zeros(sum(len(document) + 1 for document in documents), np.bool_)
                    starts[np.cumsum([0] + [len(document) + 1 for document in documents[:-1]])] = True
                    tokens = np.concatenate([np.append(document, self._eod) for document in documents])
                    yield Chunk({"epoch": epoch, "dataset": before}, tokens.astype(np.int32), starts)
                    chunks += 1
            if not chunks and state is None:
                raise ValueError(f"{self.name}: empty corpus, no text; give files that hold text")
            epoch, state = epoch + 1, None

    def _texts(self, state: State | None) -> Iterator[tuple[State | None, list[str]]]:
        """One pass: documents, CHUNK_CHARS together, and the dataset's state before them.

        A remote file that cannot be read is tried again, from the last chunk that was whole.
        """
        waits = RETRY_S
        chunks = self._open(state)
        while True:
            try:
                values, after = next(chunks)
            except StopIteration:
                return
            except Exception as error:  # of the library and whatever brings the bytes
                if not waits or not any("://" in file for file in self._files):
                    raise ValueError(f"data.train, {self.name}: cannot be read on: {error}") from error
                time.sleep(waits[0])
                waits, chunks = waits[1:], self._open(state)
                continue
            if strange := {type(value).__name__ for value in values if not isinstance(value, str)}:
                raise ValueError(
                    f"data.train, {self.name}: expected text in field {self._text_field!r}, "
                    f"got {' and '.join(sorted(strange))}; name the one that is text in text_field"
                )
            yield state, values
            waits, state = RETRY_S, after

    def _open(self, state: State | None) -> Iterator[tuple[list[Any], State]]:
        """The texts of one pass from a dataset's state on, CHUNK_CHARS together, and the state after them."""
        is_text = self._kind == "text"
        options = {"sample_by": "document"} if is_text else {}
        dataset = datasets.load_dataset(self._kind, data_files=self._files, split="train", streaming=True, **options)
        if state is not None:
            dataset.load_state_dict(state)
        values, chars = [], 0
        for record in dataset:
            value = record.get("text" if is_text else self._text_field)
            values.append(value)
            chars += len(value) if isinstance(value, str) else 0
            if chars >= CHUNK_CHARS:
                yield values, dataset.state_dict()
                values, chars = [], 0
        yield values, dataset.state_dict()


def _encode(coder: Tokenizer, chunk: tuple[State | None, list[str]]) -> list[Ids]:
    return coder.encode(chunk[1])


def _kind(files: list[str]) -> str:
    """What `datasets` calls the format of the files. Errors: ValueError for one of none of KINDS, or of several."""
    kinds = set()
    for file in files:
        suffixes = [suffix for suffix in PurePosixPath(file.split("?")[0]).suffixes if suffix not in PACKED]
        if not suffixes or suffixes[-1] not in KINDS:
            raise ValueError(f"data.train: expected files ending in {', '.join(KINDS)}, perhaps packed, got {file!r}")
        kinds.add(KINDS[suffixes[-1]])
    if len(kinds) > 1:
        raise ValueError(f"data.train: expected files of one format in a source, got {' and '.join(sorted(kinds))}")
    return kinds.pop()
