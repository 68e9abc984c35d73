"""Files of UTF-8 text to documents: a .txt or .md is one, a .jsonl or .tsv one a line, a .parquet one a row.

Parallel text, the same in several languages, is one such file that has each in a field or column of its own name, or a
file a language, its name ending in .de, .en and so on, with a document a line.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

PARQUET_ROWS = 1024  # read at a time
UNIT_BYTES = 1 << 21  # what a worker is given at a time


class Piece(NamedTuple):
    """Part of a file: bytes start … stop-1, of .parquet row groups; and how many bytes of the file that is."""

    path: str
    start: int
    stop: int
    bytes: float


Unit = list[Piece]
"""What is encoded together: many small files, or a piece of a large one."""


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


def units(files: list[Path]) -> Iterator[Unit]:
    """All of the files, in their order, in units of about UNIT_BYTES."""
    unit: Unit = []
    size = 0.0
    for file in files:
        for piece in _pieces(file):
            unit.append(piece)
            size += piece.bytes
            if size >= UNIT_BYTES:
                yield unit
                unit, size = [], 0.0
    if unit:
        yield unit


def language_files(inputs: list[str], language: str, languages: list[str]) -> list[Path]:
    """As `find_files`, of parallel text; an input may be what the names of files a language have in common, up to the
    last dot. Where there is none of this language, that of another stands for it, which has as many lines."""
    files: list[Path] = []
    for start in inputs:
        of = [path for name in (language, *languages) if (path := Path(f"{start}.{name}")).is_file()]
        files += of[:1] or find_files([start])
    return files


def read_documents(piece: Piece, text_field: str, optional: bool = False) -> Iterator[str]:
    """The documents of a piece, in order. `text_field` names the text of a .jsonl or .tsv line or a .parquet row; one
    that is `optional` is empty where it is missing.

    Errors: ValueError that names the file and the byte, line (from 1) or row (from 0) of what is not
    UTF-8, not JSON, not Parquet, or lacks the field.
    """
    return READERS.get(Path(piece.path).suffix, _read_lines)(piece, text_field, optional)


def _pieces(path: Path) -> Iterator[Piece]:
    """A text file is one; files of lines are cut into bytes, .parquet into row groups."""
    size = path.stat().st_size
    match path.suffix:
        case ".txt" | ".md":
            yield Piece(str(path), 0, size, size)
        case ".parquet":
            with _parquet(path) as file:
                n_groups, rows = file.metadata.num_row_groups, max(file.metadata.num_rows, 1)
                sizes = [file.metadata.row_group(i).num_rows / rows * size for i in range(n_groups)]
            for start in range(0, n_groups, step := max(1, int(UNIT_BYTES * n_groups / max(size, 1)))):
                stop = min(start + step, n_groups)
                yield Piece(str(path), start, stop, sum(sizes[start:stop]))
        case _:
            for start in range(0, size, UNIT_BYTES):
                stop = min(start + UNIT_BYTES, size)
                yield Piece(str(path), start, stop, stop - start)


def _read_text(piece: Piece, text_field: str, optional: bool) -> Iterator[str]:
    path = Path(piece.path)
    yield _decode(path.read_bytes(), path, start=0)


def _lines(piece: Piece) -> Iterator[tuple[int, str]]:
    """The lines that begin inside the piece, and at which byte of the file."""
    path = Path(piece.path)
    with open(path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        at = file.tell()
        while at < piece.stop:
            raw = file.readline()
            yield at, _decode(raw, path, at)
            at += len(raw)


def _read_lines(piece: Piece, text_field: str, optional: bool) -> Iterator[str]:
    """Of a file of another language there are as many documents, all of them empty."""
    there = Path(piece.path).suffix == f".{text_field}"
    for _, line in _lines(piece):
        yield line.rstrip("\r\n") if there else ""


def _read_jsonl(piece: Piece, text_field: str, optional: bool) -> Iterator[str]:
    path = Path(piece.path)
    for at, line in _lines(piece):
        if not line.isspace():
            try:
                text = _field_of_json(line, text_field, optional)
            except ValueError as error:
                raise ValueError(f"{path}, line {_line_number(path, at)}: {error}") from error
            yield text


def _read_tsv(piece: Piece, text_field: str, optional: bool) -> Iterator[str]:
    """The first line names the columns. There is no quoting: a text has neither tabs nor line ends."""
    path = Path(piece.path)
    with open(path, "rb") as file:
        names = _decode(file.readline(), path, 0).rstrip("\r\n").split("\t")
    if not optional:
        _require(text_field, names, f"{path}, line 1: ")
    for at, line in _lines(piece):
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != len(names):
            raise ValueError(
                f"{path}, line {_line_number(path, at)}: expected {len(names)} columns as line 1 has, got {len(fields)}"
            )
        if at:
            yield fields[names.index(text_field)] if text_field in names else ""


def _read_parquet(piece: Piece, text_field: str, optional: bool) -> Iterator[str]:
    path = Path(piece.path)
    with _parquet(path) as file:
        if optional and text_field not in file.schema_arrow.names:
            n_rows = sum(file.metadata.row_group(i).num_rows for i in range(piece.start, piece.stop))
            yield from [""] * n_rows
            return
        _require(text_field, file.schema_arrow.names, f"{path}, every row: ")
        row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[text_field]):
            for value in batch.column(0):
                try:
                    found = _python(value)
                    text = "" if optional and found is None else _text(found, text_field)
                except ValueError as error:
                    raise ValueError(f"{path}, row {row}: {error}") from error
                yield text
                row += 1


@contextmanager
def _parquet(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError without the path
        raise ValueError(f"{path}: expected a Parquet file; {error}") from error


READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _line_number(path: Path, at: int) -> int:
    with open(path, "rb") as file:
        return 1 + file.read(at).count(b"\n")


def _decode(raw: bytes, path: Path, start: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise ValueError(f"{path}: not UTF-8 at byte {at}: {error.reason}; convert it with iconv") from error


def _field_of_json(line: str, field: str, optional: bool) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected one JSON object a line; {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if optional and record.get(field) is None:
        return ""
    _require(field, record)
    return _text(record[field], field)


def _python(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the text: {error.reason}") from error


def _require(field: str, fields: Collection[str], where: str = "") -> None:
    if field not in fields:
        raise ValueError(f"{where}expected a field {field!r}, found {list(fields)}; name the one that is text")


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text in field {field!r}, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise ValueError(f"field {field!r} is not Unicode text: {error.reason}") from error
    return value
