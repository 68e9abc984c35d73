"""What a run left out, and why: `faults.jsonl`, one object a step left out and one each time the run went back."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlm.guard import Judged


@dataclass(frozen=True)
class Rollback:
    """Having come to `step`, the run went back to its checkpoint of step `to`; its next batch was `next_batch`."""

    step: int
    to: int
    next_batch: int
    suspect: str


class Faults:
    """Every rank knows which batches are left out; one, that `writes`, keeps the record of it.

    Errors: ValueError for a record that is damaged.
    """

    def __init__(self, run: Path, writes: bool) -> None:
        self._path, self._writes = run / "faults.jsonl", writes
        self.records = _read(self._path)

    def start_after(self, step: int) -> None:
        """Forgets what happened after `step`: the run goes on from there, and it will happen again.

        What happened before it last went back to that step, or an earlier one, is behind it.
        """
        behind = [i for i, record in enumerate(self.records) if "to" in record and record["to"] <= step]
        kept = behind[-1] + 1 if behind else 0
        later = [record for record in self.records[kept:] if "to" not in record and record["step"] <= step]
        self.records = self.records[:kept] + later
        self._store()

    @property
    def rollbacks(self) -> list[Rollback]:
        return [Rollback(**record) for record in self.records if "to" in record]

    def batch(self, step: int) -> int:
        """The number of the batch that `step` takes: of all batches those left out come between."""
        last = next((back for back in reversed(self.rollbacks) if back.to < step), None)
        return step if last is None else last.next_batch + step - last.to - 1

    def left_out(self, step: Judged) -> None:
        self._append(step._asdict() | {"left_out": True})

    def roll_back(self, rollback: Rollback) -> None:
        self._append(asdict(rollback))

    def _append(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))
        self._store()

    def _store(self) -> None:
        if not self._writes or not (self.records or self._path.exists()):
            return
        partial = self._path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._path)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); it says which batches the run leaves out: repair it") from None
