"""Files of text to a token shard [n_tokens] and the facts about it, or one a language: the verb `nlm tokenize`."""

import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nlm.data.documents import Unit, find_files, language_files, read_documents, units
from nlm.data.encode import encode_in_order
from nlm.data.shards import SCAN_TOKENS, Saved, ShardWriter, TokenShard, shard_path
from nlm.data.tokenizer import Tokenizer, language_tag, load_tokenizer, tokenizer_sha256, train_sentencepiece

BATCH_CHARS = 1 << 17  # encoded together: little enough to stay in the cache


@dataclass(frozen=True)
class Summary:
    """What was written. `bytes`: of the text, in UTF-8. The entropy: of the tokens' frequencies, with eod."""

    documents: int
    tokens: int
    bytes: int
    unigram_entropy_nats: float
    seconds: float


class Encoded(NamedTuple):
    """Documents one behind the other, and how many bytes of text they were."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    bytes: int


def tokenize(
    inputs: list[str],
    out: str,
    tokenizer: str | None,
    train_tokenizer: int | None,
    text_field: str = "text",
    workers: int = 0,
) -> Summary:
    """Write OUT.bin, OUT.idx and OUT.json; with `train_tokenizer`, a vocabulary size, OUT.model too.

    Documents keep the order of `inputs`, each followed by the tokenizer's eod; one without tokens is left
    out. `workers` processes read and encode. What was there before is replaced when all is written and read again;
    a run that was interrupted before goes on where it was, if its inputs are what they were.

    Errors: ValueError for bad inputs (see `documents`), a bad tokenizer, both or neither of the two ways to
    name one, or no text at all; OSError where the files cannot be written, or do not hold what was written.
    """
    _require_one(tokenizer, train_tokenizer)
    return _tokenize({out: (text_field, find_files(inputs), False)}, out, tokenizer, train_tokenizer, workers)[out]


def tokenize_languages(
    inputs: list[str],
    out: str,
    languages: list[str],
    tokenizer: str | None,
    train_tokenizer: int | None,
    workers: int = 0,
) -> dict[str, Summary]:
    """As `tokenize`, of parallel text: OUT.de.bin and so on, a shard a language, with a joint vocabulary.

    Document i is the same text in all of them, and only its eod where a language lacks it. The vocabulary has a
    `language_tag` of each.

    Errors: as `tokenize`; ValueError for a tokenizer without the tags, or files that have not as many documents in each
    language, or one that has no text at all.
    """
    _require_one(tokenizer, train_tokenizer)
    shards = {
        f"{out}.{language}": (language, language_files(inputs, language, languages), True) for language in languages
    }
    made = dict(zip(languages, _tokenize(shards, out, tokenizer, train_tokenizer, workers).values(), strict=True))
    counts = {language: summary.documents for language, summary in made.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected as many documents in each language, got {counts}; align them line by line")
    return made


def _require_one(tokenizer: str | None, train_tokenizer: int | None) -> None:
    if (tokenizer is None) == (train_tokenizer is None):
        came = "neither" if tokenizer is None else "both"
        raise ValueError(f"expected --tokenizer or --train-tokenizer, got {came}; give exactly one of them")


def _tokenize(
    shards: dict[str, tuple[str, list[Path], bool]],
    out: str,
    tokenizer: str | None,
    train_tokenizer: int | None,
    workers: int,
) -> dict[str, Summary]:
    """By their prefixes, shards of a text field of some files each, which in parallel text is a language."""
    model = shard_path(out, ".model")
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch, _progress() as progress:
        if train_tokenizer is not None:
            trained = Path(scratch, model.name)
            texts = chain.from_iterable(_texts(files, field, all_, progress) for field, files, all_ in shards.values())
            tags = [language_tag(field) for field, _, parallel in shards.values() if parallel]
            train_sentencepiece(texts, train_tokenizer, trained, tags)
            tokenizer = str(trained)
        assert tokenizer is not None, "exactly one of the two ways to name a tokenizer was given"
        made, stated = {}, {}
        for prefix, (field, files, parallel) in shards.items():
            made[prefix], stated[prefix] = _write(prefix, field, files, parallel, tokenizer, workers, progress)
        for prefix, facts in stated.items():
            Path(scratch, shard_path(prefix, ".json").name).write_text(json.dumps(facts, indent=2))
        if train_tokenizer is not None:
            os.replace(trained, model)
        for prefix in shards:
            os.replace(Path(scratch, shard_path(prefix, ".json").name), shard_path(prefix, ".json"))
    return made


def _write(
    out: str, text_field: str, files: list[Path], parallel: bool, tokenizer: str, workers: int, progress: Progress
) -> tuple[Summary, dict[str, object]]:
    """One shard -> what was written, and the facts about it."""
    started_s = time.perf_counter()
    coder = load_tokenizer(tokenizer)
    tag = coder.special(language_tag(text_field)) if parallel else None
    if parallel and tag is None:
        raise ValueError(
            f"{tokenizer}: expected a special token {language_tag(text_field)}, found none; use --train-tokenizer, or "
            "add one for each of the languages"
        )
    settings = [tokenizer_sha256(tokenizer), coder.vocab_size, text_field, *(["parallel"] if parallel else [])]
    with Journal(out, settings, list(units(files))) as journal, journal.writer(coder.vocab_size) as shard:
        task = progress.add_task("encoding", total=_bytes(*journal.units), completed=int(_bytes(*journal.done)))
        work = ((unit, text_field, parallel) for unit in journal.units[len(journal.done) :])
        workers = workers if len(journal.units) > 1 else 0
        for (unit, *_), encoded in encode_in_order(_encode, work, tokenizer, workers):
            shard.add_documents(encoded.tokens, encoded.lengths)
            journal.add(unit, shard.save(), encoded.bytes)
            progress.advance(task, _bytes(unit))
        if not journal.saved.documents or not journal.bytes:
            of = f" of field {text_field!r}" if parallel else ""
            raise ValueError(f"empty corpus: no text{of} in {len(files)} files; give inputs that hold text")
    written = TokenShard(out)
    counts, crc32 = _read_again(written.tokens, coder.vocab_size)
    if Saved(written.n_documents, written.n_tokens, crc32) != journal.saved:
        raise OSError(f"{out}: what is there is not what was written ({journal.saved}); check the disk")
    entropy, seconds = _entropy_nats(counts), time.perf_counter() - started_s
    stated: dict[str, object] = {
        "tokenizer": Path(tokenizer).name,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "vocab_size": coder.vocab_size,
        "eod": coder.eod,
        "documents": written.n_documents,
        "tokens": written.n_tokens,
        "bytes": journal.bytes,
        "max_token": int(counts.nonzero()[0].max()),
        "unigram_entropy_nats": entropy,
        **({"tag": tag} if parallel else {}),
    }
    return Summary(written.n_documents, written.n_tokens, journal.bytes, entropy, seconds), stated


class Journal:
    """OUT.journal: a line of JSON a unit that is written, by which an interrupted run goes on.

    The units that it finds done are those at the beginning whose files are what they were, under the same settings.
    """

    def __init__(self, out: str, settings: Sequence[object], units: list[Unit]) -> None:
        self.units, self.done = units, list[Unit]()
        self.saved, self.bytes = Saved(), 0
        self._out, self._path = out, shard_path(out, ".journal")
        lines = [json.dumps([*settings]) + "\n"]
        before = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        if before[:1] == lines:
            for unit, line in zip(units, before[1:], strict=False):
                entry = json.loads(line) if line.endswith("\n") else {}
                if entry.get("unit") != _identity(unit):
                    break
                self.saved, self.bytes = Saved(*entry["saved"]), entry["bytes"]
                self.done.append(unit)
                lines.append(line)
        self._path.write_text("".join(lines), encoding="utf-8")

    def add(self, unit: Unit, saved: Saved, n_bytes: int) -> None:
        self.saved, self.bytes = saved, self.bytes + n_bytes
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": _identity(unit), "saved": saved, "bytes": self.bytes}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def writer(self, vocab_size: int) -> ShardWriter:
        return ShardWriter(self._out, vocab_size, self.saved)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """It is kept for another try only if there is something to go on from."""
        if kind is None or not self.saved.documents:
            self._path.unlink()


def _identity(unit: Unit) -> list[object]:
    stats = [(piece, os.stat(piece.path)) for piece in unit]
    return [[*piece[:3], stat.st_size, stat.st_mtime_ns] for piece, stat in stats]


def _bytes(*units: Unit) -> float:
    return sum(piece.bytes for unit in units for piece in unit)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _texts(files: list[Path], text_field: str, optional: bool, progress: Progress) -> Iterator[str]:
    task = progress.add_task("training", total=sum(file.stat().st_size for file in files))
    for unit in units(files):
        for piece in unit:
            yield from read_documents(piece, text_field, optional)
            progress.advance(task, piece.bytes)


def _encode(coder: Tokenizer, work: tuple[Unit, str, bool]) -> Encoded:
    unit, text_field, parallel = work
    end = np.array([coder.eod], np.int32)
    tokens, lengths, n_bytes = [end[:0]], [], 0
    for texts in batched(text for piece in unit for text in read_documents(piece, text_field, parallel)):
        for text, ids in zip(texts, coder.encode(texts), strict=True):
            if ids.size or parallel:
                tokens += ids, end
                lengths.append(len(ids) + 1)
                n_bytes += len(text.encode())
    return Encoded(np.concatenate(tokens), np.array(lengths, np.int32), n_bytes)


def batched(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts of BATCH_CHARS together; the last may be none."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def _read_again(tokens: NDArray[np.integer], vocab_size: int) -> tuple[NDArray[np.int64], int]:
    """[n_tokens] -> how often each token comes [vocab_size], and the checksum of all."""
    counts, crc32 = np.zeros(vocab_size, np.int64), 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        part = np.array(tokens[start : start + SCAN_TOKENS])
        counts += np.bincount(part, minlength=vocab_size)
        crc32 = zlib.crc32(part.data, crc32)
    return counts, crc32


def _entropy_nats(counts: NDArray[np.int64]) -> float:
    """[vocab_size] -> -sum p ln p, the loss of a model that knows how frequent tokens are, no more."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
