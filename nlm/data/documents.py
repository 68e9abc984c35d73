"""Files of UTF-8 text to documents: a .txt or .md is one, a .jsonl one a line, a .parquet one a row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

PARQUET_ROWS = 1024  # read at a time


class Document(NamedTuple):
    """A text, and the share of its file that it took in bytes."""

    text: str
    file_bytes: float


def find_files(inputs: list[str]) -> list[Path]:
    """The files in `inputs` in their order, and for a directory all files of a known kind below it, sorted.

    Errors: ValueError for a missing input, a file of another kind, or a directory that holds none of a known.
    """
    kinds = ", ".join(READERS)
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
            if not found:
                raise ValueError(f"{path}: expected files ending in {kinds} below, found none")
            files += found
        elif not path.exists():
            raise ValueError(f"{path}: no such file or directory; give inputs that exist")
        elif path.suffix not in READERS:
            raise ValueError(f"{path}: expected a file ending in {kinds}; rename or convert it")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"expected at least one input, a directory or a file ending in {kinds}, got none")
    return files


def read_documents(path: Path, text_field: str) -> Iterator[Document]:
    """The documents of one file, in order. `text_field` names the text of a .jsonl line or a .parquet row.

    Errors: ValueError that names the file and the byte, line (from 1) or row (from 0) of what is not
    UTF-8, not JSON, not Parquet, or lacks the field.
    """
    return READERS[path.suffix](path, text_field)


def _read_text(path: Path, text_field: str) -> Iterator[Document]:
    raw = path.read_bytes()
    yield Document(_decode(raw, path, start=0), len(raw))


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    start = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            line = _decode(raw, path, start)
            start += len(raw)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: expected one JSON object a line; {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            _require(text_field, list(record), where)
            yield Document(_text(record[text_field], text_field, where), len(raw))


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require(text_field, file.schema_arrow.names, f"{path}, every row")
            row, row_bytes = 0, path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    where = f"{path}, row {row}"
                    yield Document(_text(_python(value, where), text_field, where), row_bytes)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError without the path
        raise ValueError(f"{path}: expected a Parquet file; {error}") from error


READERS = {".txt": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _decode(raw: bytes, path: Path, start: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise ValueError(f"{path}: not UTF-8 at byte {at}: {error.reason}; convert it with iconv") from error


def _python(value: Any, where: str) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the text: {error.reason}") from error


def _require(field: str, fields: list[str], where: str) -> None:
    if field not in fields:
        raise ValueError(f"{where}: expected a field {field!r}, found {fields}; name the one that is text")


def _text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text in field {field!r}, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise ValueError(f"{where}: field {field!r} is not Unicode text: {error.reason}") from error
    return value
