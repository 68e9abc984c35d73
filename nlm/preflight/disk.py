"""Whether all ranks write and read the same run folder, how fast, and whether its checkpoints have room.

Three checks, one after the other: rank 0 leaves a token; every rank reads it and writes it back; rank 0 reads those.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nlm.checkpoint import checkpoints
from nlm.config import Config
from nlm.parallel.watch import until
from nlm.plan.plan import parameters_by_role
from nlm.preflight.check import All, Check, Column, Found, Place, Problem, far_below, having

SEEN_S = 5
"""For a file to be seen by another host. A name that nobody has asked for is in no cache of NFS; an object store that
is mounted takes a moment."""
WRITTEN = 2**25
"""Bytes by which a host's speed is told: more than a network's buffers hold, and little even from a hundred hosts."""
SLOW = 5e6
"""Bytes/s, flushed to the disk: a checkpoint of 10 GB would take half an hour."""
SLOW_SHARE = 0.1
"""Of the median of the hosts. Those that write to one disk at the same time differ by several times."""
SAVED_BYTES = 12
"""Of a parameter in a checkpoint: float32, and the two moments of Adam, than which no optimizer keeps more."""

TODO = "see whether that folder's file system answers on that host, is mounted for writing and has room"


def leave_token(place: Place, found: Found) -> None:
    if place.rank:
        return
    run, token = Path(place.config.log.dir), secrets.token_hex(8)
    # The folder of checkpoints may be a link to another file system.
    folders = [run, *(folder for folder in [run / "checkpoints"] if folder.is_dir())]
    places = [str(folder / f".preflight-{token}") for folder in folders]
    place.store.set("token", json.dumps([token, places]))
    for here in places:
        Path(here).mkdir(parents=True)
        (Path(here) / "0").write_text(token)
    found["needed_bytes"] = needed_bytes(place.config)


def needed_bytes(config: Config) -> int:
    """Of all checkpoints that will lie there together and do not yet: the newest, one that is being written, and those
    kept for good."""
    kept = config.checkpoint
    numbers = min(kept.keep_last + 1, config.train.steps // kept.every + 1) if kept.every else 1
    numbers += config.train.steps // kept.keep_every if kept.keep_every else 0
    missing = max(1, numbers - len(checkpoints(Path(config.log.dir))))
    return missing * SAVED_BYTES * sum(parameters_by_role(config).values())


def write_back(place: Place, found: Found) -> None:
    token, places = json.loads(place.store.get("token"))
    for here in map(Path, places):
        if not until(partial(_has, here / "0", token), SEEN_S):
            found["not_shared"] = str(here.parent)
            return
        free = shutil.disk_usage(here).free
        found["free_bytes"] = min(free, found.get("free_bytes", free))
        (here / str(place.rank)).write_text(token)
    place.store.set(f"wrote/{place.rank}", "")
    if place.local_rank == 0:
        found["write_speed"] = min(speed(Path(here) / f"speed-{place.rank}") for here in places)


def _has(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except FileNotFoundError:
        return False


def speed(path: Path) -> float:
    """Bytes/s of a file that is written, flushed and removed."""
    block = os.urandom(2**20)  # nothing that a file system could make small
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return WRITTEN / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def read_back(place: Place, found: Found) -> None:
    if place.rank:
        return
    token, places = json.loads(place.store.get("token"))
    try:
        wrote = [rank for rank in range(place.world_size) if place.store.check([f"wrote/{rank}"])]

        def unseen() -> list[int]:
            return [rank for rank in wrote if not all(_has(Path(here) / str(rank), token) for here in places)]

        until(lambda: not unseen(), SEEN_S)
        found["unseen"] = unseen()
    finally:
        for here in places:
            shutil.rmtree(here, ignore_errors=True)


def judge(found: All, config: Config) -> Iterator[Problem]:
    todo = "put log.dir on a file system that all hosts mount, under the same path (checkpoints are written by all)"
    for rank, folder in having(found, "not_shared").items():
        yield Problem((rank,), "free_bytes", f"in {folder} the token that rank 0 left", "no such file", todo)
    for rank in found.get(0, {}).get("unseen", ()):
        expected = f"in {config.log.dir} the token that this rank wrote, as rank 0 sees it"
        yield Problem((rank,), "free_bytes", expected, "no such file", todo)
    needed = found.get(0, {}).get("needed_bytes", 0)
    for rank, free in having(found, "free_bytes").items():
        if free < needed:
            expected = f"{needed / 2**30:.3g} GiB free in {config.log.dir}, for its checkpoints"
            todo = "make room, or lower checkpoint.keep_last, or raise keep_every"
            yield Problem((rank,), "free_bytes", expected, f"{free / 2**30:.3g} GiB", todo)
            break  # it is the same disk for all
    speeds = having(found, "write_speed")
    usual, slow = far_below(speeds, SLOW_SHARE) if speeds else (0.0, [])
    for rank, its in speeds.items():
        if rank in slow or its < SLOW:
            least = max(SLOW, SLOW_SHARE * usual)
            expected = f"at least {least / 1e6:.3g} MB/s written to {config.log.dir}"
            todo = "see how that host mounts it, and who else writes there"
            yield Problem((rank,), "write_speed", expected, f"{its / 1e6:.3g} MB/s", todo)


def nothing(found: All, config: Config) -> Iterator[Problem]:
    return iter(())


TOKEN = Check("token", leave_token, nothing, (), TODO)
DISK = Check(
    "disk",
    write_back,
    judge,
    (Column("free_bytes", "disk free, GiB", "{:.3g}", 2**-30), Column("write_speed", "written, MB/s", "{:.0f}", 1e-6)),
    TODO,
)
READ_BACK = Check("read back", read_back, nothing, (), TODO)
