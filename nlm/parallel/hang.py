"""A hang: what each rank was doing when no step ended any more, and whom the others wait for.

Every rank's collectives are known from torch's flight recorder, its own code from the stack of its main thread.
"""

import faulthandler
import json
import pickle
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch._C._distributed_c10d import _dump_fr_trace  # type: ignore[attr-defined]  # unknown to mypy

PACKAGE = Path(__file__).parents[1]


class Doing(NamedTuple):
    """Where a rank's main thread is; how many collectives it has begun in each group, by the group's name; the one it
    waits in, if any."""

    at: str
    begun: Mapping[str, int]
    waits_in: str | None

    def to_json(self) -> str:
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        return cls(*json.loads(text))


def doing(folder: Path, rank: int) -> Doing:
    """What this process does; the whole of it in two files of `folder`: `trace_rank_N` for torch's own tool
    (`torchfrtrace`), and the stacks of all threads."""
    trace = _dump_fr_trace()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"trace_rank_{rank}").write_bytes(trace)
    with open(folder / f"stacks_rank_{rank}.txt", "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file)
    record = pickle.loads(trace)
    entries = [entry for entry in record["entries"] if not _of_a_thread(entry)]
    # Groups have numbers of this process's own and names that all ranks share.
    names = {str(entry["pg_id"]): entry["process_group"][0] for entry in entries}
    begun = {names[n]: count["last_enqueued_collective"] for n, count in record["pg_status"].items() if n in names}
    unfinished = [entry for entry in entries if not entry["is_p2p"] and not entry["retired"]]
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    stack = [frame for frame in frames if Path(frame.filename).name != "waits.py"]  # which times what waits
    # Sends and receives of a pipeline are no collectives.
    inside = stack[-1].name if "/torch/distributed/" in stack[-1].filename else None
    waits_in = _described(unfinished[0]) if unfinished else inside
    ours = [frame for frame in stack if PACKAGE in Path(frame.filename).parents] or stack
    at = _place(ours[-1])
    if waits_in is None and stack[-1] is not ours[-1]:
        at += f", from there at {_place(stack[-1])}"
    return Doing(at, begun, waits_in)


def _place(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def _of_a_thread(entry: Mapping[str, Any]) -> bool:
    """Such as the one that writes a checkpoint, whose collectives keep no step from ending."""
    return any(frame["name"] == "_bootstrap_inner" for frame in entry["frames"])  # of threading.py


def _described(entry: Mapping[str, Any]) -> str:
    name = entry["profiling_name"].partition(":")[2]
    return f"{name} number {entry['collective_seq_id']} of group {entry['process_group'][0]}"


def blamed(ranks: Mapping[int, Doing]) -> tuple[int, str]:
    """-> the rank that the others wait for, and what it and they do.

    It is one that waits for nobody; where all do, one that has begun fewer collectives in a group than another.
    """
    most: Counter[str] = Counter()
    for its in ranks.values():
        most |= Counter(its.begun)
    idle = [rank for rank, its in ranks.items() if its.waits_in is None]
    late = [rank for rank, its in ranks.items() if any(n < most[group] for group, n in its.begun.items())]
    rank = next(iter(idle or late or ranks))
    text = f"it is at {ranks[rank].at}" + (f", in {ranks[rank].waits_in}" if ranks[rank].waits_in else "")
    waiting: dict[str, list[int]] = {}
    for other, its in ranks.items():
        if its.waits_in and other != rank:
            waiting.setdefault(f"in {its.waits_in}, at {its.at}", []).append(other)
    for what, others in waiting.items():
        text += f"; waiting {what}: rank {others[0]}" + (f" and {len(others) - 1} more" if len(others) > 1 else "")
    return rank, text
