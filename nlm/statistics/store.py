"""The folder `layers/` of a run: one vector [L] for each (quantity, logged step), in columns, only ever appended to.

Every start of the run writes a file of its own, an Arrow stream named after the step it started from; a record
batch is one logged step. What an interrupted process had written beyond the step from which the next one started
is left out when the folder is read.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

STEP = "step"
PREFIX = "from-"


class LayerWriter:
    """Context manager that appends the vectors of one logged step after another, the first after step `start`."""

    def __init__(self, run: Path, n_layers: int, start: int) -> None:
        self.run, self.start, self.n_layers = run, start, n_layers

    def __enter__(self) -> Self:
        folder = self.run / "layers"
        folder.mkdir(exist_ok=True)
        for start, file in _files(self.run):
            if start > self.start:  # a run that went back further than the last time makes these steps again
                file.unlink()
        self.path = folder / f"{PREFIX}{self.start:08d}.arrows"
        self._file = self.path.open("wb")
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if self._stream is not None:
                self._stream.close()

    def write(self, step: int, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Vectors [L] by name, the same names at every step. Complete in the file when this returns."""
        columns = {STEP: pa.array([step], pa.int64())}
        for name, vector in vectors.items():
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(vector, pa.float32()), self.n_layers)
        batch = pa.record_batch(columns)
        if self._stream is None:
            self._stream = pa.ipc.new_stream(self._file, batch.schema)
        self._stream.write_batch(batch)
        self._file.flush()


class StoredLayers(Mapping[str, NDArray[Any]]):
    """A run's statistics, each read when it is asked for: "step" [steps] int64 and, by name, [steps L] float32.

    What a start of the run did not record yet is NaN there. Without statistics it is empty.
    """

    def __init__(self, run: str | Path) -> None:
        files = _files(Path(run))
        ends = [start for start, _ in files[1:]] + [inf]
        batches = [
            batch
            for (_, file), end in zip(files, ends, strict=False)
            for batch in _whole_batches(file)
            if batch[STEP][0].as_py() <= end
        ]
        tables = [pa.Table.from_batches(same) for _, same in groupby(batches, key=lambda batch: batch.schema)]
        self._table = pa.concat_tables(tables, promote_options="default") if tables else pa.table({})

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._table.column_names:
            raise KeyError(name)
        column = self._table[name]
        return column.to_numpy() if name == STEP else _matrix(column)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table.column_names)


def read_layers(run: str | Path, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """A run's statistics: "step" [steps] int64 and, by name, [steps L] float32; `names` picks some.

    Errors: ValueError for a run without statistics, or one without a statistic of that name.
    """
    stored = StoredLayers(run)
    if not stored:
        raise ValueError(f"{run}: no layer statistics; give the folder of a run with statistics.enabled = true")
    chosen = [name for name in stored if name != STEP] if names is None else list(names)
    if missing := sorted(set(chosen) - set(stored)):
        raise ValueError(f"{run}: no statistic {', '.join(missing)}; there are {', '.join(stored)}")
    return {name: stored[name] for name in (STEP, *chosen)}


def _files(run: Path) -> list[tuple[int, Path]]:
    """Each file with the step it started from, in order."""
    files = (run / "layers").glob(f"{PREFIX}*.arrows")
    return sorted((int(file.stem.removeprefix(PREFIX)), file) for file in files)


def _whole_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of a stream, up to one that a killed process left unfinished at its end."""
    with pa.memory_map(str(file)) as source:
        try:
            yield from pa.ipc.open_stream(source)
        except (pa.ArrowInvalid, OSError):
            return


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of lists of L numbers -> [steps L], NaN where there is no list."""
    lists = column.combine_chunks()
    values: NDArray[np.float32] = lists.flatten().to_numpy().reshape(-1, column.type.list_size)
    if not lists.null_count:
        return values
    matrix = np.full((len(lists), column.type.list_size), np.nan, np.float32)
    matrix[lists.is_valid().to_numpy(zero_copy_only=False)] = values
    return matrix
