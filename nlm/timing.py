"""How long each rank takes for a step, and in it for data and for the others; and who keeps the others waiting.

What is measured, and where, is said in nlm.parallel.waits. At a logged step the ranks exchange percentiles over the
steps since the last one, a small table; in between nobody waits for anything, a GPU's events included.
"""

import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from nlm.mesh import Mesh
from nlm.parallel.waits import Moment, Waits, is_over, seconds

PERCENTILES = (50, 90, 99)
MEASURES = ("step_s", "data_s", "wait_s", "own_s")
"""A step; in it, the host's time to read its rows; waiting in collectives; and all but that, data included."""
SLOWER = 1.2
"""Times the median own time of the others, from where on a rank is slow."""
SHARE = 0.05
"""Of a step, that a rank must take longer than the others: less is not worth a word."""
RECORDS, STEPS = 3, 10
"""How many logged steps, and steps, a rank must have been slow in a row."""

Table = NDArray[np.float64]
"""[ranks measures percentiles]."""


class StepTimes(Waits):
    """Context manager: the times of this rank's steps."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh.device)
        self.mesh = mesh
        self._open: deque[tuple[Moment, float, list[tuple[Moment, Moment]], Moment]] = deque()
        self._closed: list[tuple[float, float, float]] = []

    def __enter__(self) -> Self:
        super().__enter__()
        self.hosts = _of_all(self.mesh, socket.gethostname())
        # The stages of a pipeline have different work: a rank is compared with those that do the same.
        self.stages = _of_all(self.mesh, self.mesh.rank("pp"))
        return self

    def restart(self) -> None:
        """Forgets the steps so far."""
        self._open.clear()
        self._closed.clear()
        self.spans = None

    def begin(self) -> None:
        self._begun, self.spans, self._data = self.now(), [], time.perf_counter()

    def has_data(self) -> None:
        """The rows are read. (Those of a stream are passed on by a rank: for that the others wait.)"""
        waited = sum(seconds(*span) for span in self.spans or () if isinstance(span[0], float))
        self._data = time.perf_counter() - self._data - waited

    def end(self) -> None:
        """The step is done, as far as the host is concerned."""
        self._open.append((self._begun, self._data, self.spans or [], self.now()))
        self.spans = None
        while self._open and is_over(self._open[0][-1]):
            self._close(self._open.popleft())

    def _close(self, step: tuple[Moment, float, list[tuple[Moment, Moment]], Moment]) -> None:
        begin, data, spans, end = step
        self._closed.append((seconds(begin, end), data, sum(seconds(*span) for span in spans)))

    def table(self) -> tuple[int, Table]:
        """Called by all ranks at once, which waits for the device -> the number of steps since the last call, and
        their percentiles on every rank."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        while self._open:
            self._close(self._open.popleft())
        step_s, data_s, wait_s = np.array(self._closed).T
        own = np.percentile([step_s, data_s, wait_s, (step_s - wait_s).clip(min=0)], PERCENTILES, axis=1)
        steps = len(self._closed)
        self._closed.clear()
        ranks = len(self.hosts)
        table = torch.zeros(ranks, len(MEASURES), len(PERCENTILES), dtype=torch.float64, device=self.mesh.device)
        table[dist.get_rank() if ranks > 1 else 0] = torch.from_numpy(own.T)
        return steps, self.mesh.sum(table).cpu().numpy()


def record(steps: int, table: Table, hosts: Sequence[str]) -> dict[str, Any]:
    """A line of `timing.jsonl`, but for its step: by measure and percentile, a number for every rank."""
    numbers = {
        measure: {f"p{p}": [float(f"{x:.4g}") for x in table[:, i, j]] for j, p in enumerate(PERCENTILES)}
        for i, measure in enumerate(MEASURES)
    }
    return {"steps": steps, "hosts": list(hosts), **numbers}


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow `since` a step, up to `step`: own time, and what the others take."""

    step: int
    rank: int
    host: str
    metric: str
    expected: float
    seen: float
    since: int
    text: str


class Stragglers:
    """Judges every logged step by each rank's median own time beside that of the ranks of its stage."""

    def __init__(self, hosts: Sequence[str], stages: Sequence[int], after: int) -> None:
        self.hosts, self.stages, self._last = hosts, np.array(stages), after
        self._slow: dict[int, tuple[int, int, int]] = {}
        """By rank: since which step, and for how many records and steps."""
        self._named: set[int] = set()

    def judge(self, step: int, steps: int, table: Table) -> list[Straggler]:
        """Those that it is time to name: once, until they are no longer slow."""
        step_s, data_s, _, own_s = table[:, :, 0].T
        found = []
        for rank, usual in enumerate(_usual(own_s, self.stages)):
            if own_s[rank] < SLOWER * usual or own_s[rank] - usual < SHARE * step_s[rank]:
                self._slow.pop(rank, None)
                self._named.discard(rank)
                continue
            since, records, before = self._slow.get(rank, (self._last + 1, 0, 0))
            self._slow[rank] = since, records + 1, before + steps
            if records + 1 < RECORDS or before + steps < STEPS or rank in self._named:
                continue
            self._named.add(rank)
            read = (
                f"{data_s[rank]:.3g} s of it reading data" if data_s[rank] > (own_s[rank] - usual) / 2 else "computing"
            )
            text = (
                f"straggler: rank {rank} on {self.hosts[rank]}: {own_s[rank] / usual:.2g} × the own time a step of "
                f"the others ({own_s[rank]:.3g} s, {usual:.3g} s), {read}"
            )
            found.append(
                Straggler(step, rank, self.hosts[rank], "own_s", float(usual), float(own_s[rank]), since, text)
            )
        self._last = step
        return found


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """Of a run's lines of `timing.jsonl`, one line for people: the step, and who has the largest own time."""
    rows = by_rank(records)
    step = " / ".join(f"{rows[0]['step_s'][p]:.3g}" for p in PERCENTILES)
    text = f"a step took {step} s (p50 / p90 / p99), reading data at most {max(r['data_s'][50] for r in rows):.2g} s"
    if len(rows) == 1:
        return text
    slowest = max(rows, key=lambda row: row["own_s"][50])
    others = median(row["own_s"][50] for row in rows if row is not slowest)
    ratio = slowest["own_s"][50] / others if others else np.inf
    return f"{text}; most time of its own has rank {slowest['rank']} on {slowest['host']}, {ratio:.2f} × the others'"


def by_rank(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of `timing.jsonl` -> for each rank of the last start its host and, by measure and percentile, the median
    over the lines."""
    hosts = records[-1]["hosts"]
    same = [record for record in records if record["hosts"] == hosts]
    middle = {
        measure: {p: np.median([record[measure][f"p{p}"] for record in same], axis=0) for p in PERCENTILES}
        for measure in MEASURES
    }
    return [
        {"rank": rank, "host": host} | {m: {p: float(x[rank]) for p, x in of.items()} for m, of in middle.items()}
        for rank, host in enumerate(hosts)
    ]


def _of_all(mesh: Mesh, value: Any) -> list[Any]:
    """What each rank has, by rank."""
    if mesh.device_mesh is None:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _usual(own_s: NDArray[np.float64], stages: NDArray[np.int64]) -> NDArray[np.float64]:
    """[ranks] -> [ranks]: what the ranks of the same stage take, or all where each has a stage to itself: of two, each
    what the other does, of more the median; a rank alone has nobody beside it."""
    usual = np.full_like(own_s, np.inf)
    if len(np.unique(stages)) == len(stages):
        stages = np.zeros_like(stages)
    for stage in np.unique(stages):
        same = np.flatnonzero(stages == stage)
        if len(same) > 1:
            usual[same] = own_s[same[::-1]] if len(same) == 2 else np.median(own_s[same])
    return usual
