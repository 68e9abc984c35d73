"""The folder `layers/` of a run: one vector [L] for each (quantity, logged step), in columns, only ever appended to.

Every start of the run writes a file of its own, an Arrow stream named after the step it started from; a record
batch is one logged step. What an interrupted process had written beyond the step from which the next one started
is left out when the folder is read.
"""

from collections.abc import Iterable, Iterator, Mapping
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


def read_layers(run: str | Path, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """A run's statistics: "step" [steps] int64 and, by name, [steps L] float32; `names` picks some.

    Errors: ValueError for a run without statistics, or one without a statistic of that name.
    """
    batches = _batches(Path(run))
    if not batches:
        raise ValueError(f"{run}: no layer statistics; give the folder of a run with statistics.enabled = true")
    table = pa.Table.from_batches(batches)
    chosen = [name for name in table.column_names if name != STEP] if names is None else list(names)
    if missing := sorted(set(chosen) - set(table.column_names)):
        raise ValueError(f"{run}: no statistic {', '.join(missing)}; there are {', '.join(table.column_names)}")
    steps = table[STEP].to_numpy()
    return {STEP: steps} | {name: _matrix(table[name], len(steps)) for name in chosen}


def recent_layers(run: Path, until: int, n: int) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
    """The last `n` steps recorded up to step `until`, in order, and their vectors [L]; none of a run without any."""
    batches = [batch for batch in _batches(run) if batch[STEP][0].as_py() <= until]
    for batch in batches[-n:]:
        yield (
            batch[STEP][0].as_py(),
            {name: batch[name].flatten().to_numpy() for name in batch.schema.names if name != STEP},
        )


def _batches(run: Path) -> list[pa.RecordBatch]:
    """A record batch a step, without what was made again."""
    files = _files(run)
    ends = [start for start, _ in files[1:]] + [inf]
    return [
        batch
        for (_, file), end in zip(files, ends, strict=True)
        for batch in _whole_batches(file)
        if batch[STEP][0].as_py() <= end
    ]


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


def _matrix(column: pa.ChunkedArray, steps: int) -> NDArray[np.float32]:
    """A column of `steps` lists of L numbers -> [steps L]."""
    values: NDArray[np.float32] = column.combine_chunks().flatten().to_numpy()
    return values.reshape(steps, -1)
