"""Files of text to one token shard [n_tokens] and the facts about it: the verb `nlm tokenize`."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nlm.data.documents import find_files, read_documents
from nlm.data.shards import ShardWriter, shard_path
from nlm.data.tokenizer import load_tokenizer, tokenizer_sha256, train_sentencepiece

BATCH_CHARS = 1 << 22  # encoded together


@dataclass(frozen=True)
class Summary:
    """What was written. `bytes`: of the text, in UTF-8. The entropy: of the tokens' frequencies, with eod."""

    documents: int
    tokens: int
    bytes: int
    unigram_entropy_nats: float
    seconds: float


def tokenize(
    inputs: list[str],
    out: str,
    tokenizer: str | None,
    train_tokenizer: int | None,
    text_field: str = "text",
) -> Summary:
    """Write OUT.bin, OUT.idx and OUT.json; with `train_tokenizer`, a vocabulary size, OUT.model too.

    Documents keep the order of `inputs`, each followed by the tokenizer's eod; one without tokens is left
    out. Nothing is written unless all of it can be; what was there before is then replaced.

    Errors: ValueError for bad inputs (see `documents`), a bad tokenizer, both or neither of the two ways to
    name one, or no text at all.
    """
    started_s = time.perf_counter()
    if (tokenizer is None) == (train_tokenizer is None):
        came = "neither" if tokenizer is None else "both"
        raise ValueError(f"expected --tokenizer or --train-tokenizer, got {came}; give exactly one of them")
    files = find_files(inputs)
    model, facts = shard_path(out, ".model"), shard_path(out, ".json")
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch, _progress() as progress:
        if train_tokenizer is not None:
            trained = Path(scratch, model.name)
            train_sentencepiece(_texts(files, text_field, progress, "training"), train_tokenizer, trained)
            tokenizer = str(trained)
        assert tokenizer is not None, "exactly one of the two ways to name a tokenizer was given"
        coder = load_tokenizer(tokenizer)

        documents, n_bytes, counts = 0, 0, np.zeros(coder.vocab_size, np.int64)
        with ShardWriter(out, coder.vocab_size) as shard:
            for texts in _batched(_texts(files, text_field, progress, "encoding")):
                for text, ids in zip(texts, coder.encode(texts), strict=True):
                    if ids.size:
                        document = np.append(ids, coder.eod)
                        shard.add_document(document)
                        np.add.at(counts, document, 1)
                        documents, n_bytes = documents + 1, n_bytes + len(text.encode())
            if not documents:
                raise ValueError(f"empty corpus: no text in {len(files)} files; give inputs that hold text")
            stated = {
                "tokenizer": Path(tokenizer).name,
                "tokenizer_sha256": tokenizer_sha256(tokenizer),
                "vocab_size": coder.vocab_size,
                "eod": coder.eod,
                "documents": documents,
                "tokens": int(counts.sum()),
                "max_token": int(counts.nonzero()[0].max()),
                "unigram_entropy_nats": _entropy_nats(counts),
            }
            Path(scratch, facts.name).write_text(json.dumps(stated, indent=2))
        if train_tokenizer is not None:
            os.replace(trained, model)
        os.replace(Path(scratch, facts.name), facts)
    seconds = time.perf_counter() - started_s
    return Summary(documents, int(counts.sum()), n_bytes, _entropy_nats(counts), seconds)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _texts(files: list[Path], text_field: str, progress: Progress, doing: str) -> Iterator[str]:
    task = progress.add_task(doing, total=sum(file.stat().st_size for file in files))
    for file in files:
        for text, file_bytes in read_documents(file, text_field):
            yield text
            progress.advance(task, file_bytes)


def _batched(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    yield batch


def _entropy_nats(counts: NDArray[np.int64]) -> float:
    """[vocab_size] -> -sum p ln p, the loss of a model that knows how frequent tokens are, no more."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
