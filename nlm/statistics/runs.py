"""What a run's folder holds, read while it is being written or years later."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlm.config import Table, read_table
from nlm.data.shards import shard_facts
from nlm.statistics.draw import Layers
from nlm.statistics.store import StoredLayers

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run under a name that tells it from the others."""

    name: str
    config: Table
    records: list[Record]  # of metrics.jsonl
    layers: Layers  # empty without statistics
    faults: list[Record]  # of faults.jsonl
    alarms: list[Record]  # of alarms.jsonl
    timing: list[Record]  # of timing.jsonl
    environment: Table  # of environment.json; empty in runs of an older version
    unigram_entropy_nats: float | None  # of the training tokens, where `nlm tokenize` left word of it

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps that logged a number under `key`, and the numbers."""
        pairs = [(record["step"], record[key]) for record in self.records if record.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def last(self, key: str) -> float | None:
        _, values = self.series(key)
        return values[-1] if values else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Errors: ValueError for a folder that is not a run, has no logged step yet, or is named twice."""
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _read(path: Path, name: str) -> Run:
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path}: expected the folder of a run, with metrics.jsonl in it; give a config's log.dir")
    if not (records := _lines(path / "metrics.jsonl")):
        raise ValueError(f"{path}: no step is logged yet; wait for the first")
    config = read_table(path / "config.toml")
    train, environment = config["data"]["train"], path / "environment.json"
    facts = shard_facts(train) if isinstance(train, str) else {}
    return Run(
        name,
        config,
        records,
        StoredLayers(path),
        _lines(path / "faults.jsonl"),
        _lines(path / "alarms.jsonl"),
        _lines(path / "timing.jsonl"),
        json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {},
        facts.get("unigram_entropy_nats"),
    )


def _lines(path: Path) -> list[Record]:
    """One object a line; a running process may be at the last."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, parts))):
        names = ["-".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"expected different runs, got {', '.join(map(str, paths))}; name each once")
