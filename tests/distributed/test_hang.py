"""A run that hangs is ended and brought back by torchrun itself, and ends as one that did not."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, torchrun

from nlm.checkpoint import checkpoints
from nlm.config import Config
from nlm.parallel.hang import Doing, blamed, doing
from nlm.storage import read_all

HANGING = """
import os, sys, time
from pathlib import Path
import nlm.data.rank
from nlm.cli import main

hung, rows = Path(sys.argv.pop(1)), nlm.data.rank.RankData.rows

def read(self, batch):
    if os.environ["RANK"] == "1" and batch == 6 and not hung.exists():
        hung.touch()
        time.sleep(10**6)
    return rows(self, batch)

nlm.data.rank.RankData.rows = read
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("layout", [{"dp_replicate": 2}, {"pp": 2, "microbatches": 2}], ids=str)
def test_torchrun_brings_back_a_run_that_hangs(
    layout: dict[str, int], run_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Under a pipeline the other rank hangs in a receive, which is no collective."""

    def launched(name: str, *, hangs: bool) -> tuple[Path, str]:
        config = run_config(name, parallel=layout, checkpoint={"every": 2}, faults={"hang_minutes": 0.1})
        (tmp_path / f"{name}.toml").write_text(config.to_toml())
        script, hung = tmp_path / "hanging.py", tmp_path / "hung"
        script.write_text(HANGING)
        if not hangs:
            hung.touch()
        done = torchrun(2, script, hung, "train", tmp_path / f"{name}.toml", restarts=1)
        assert done.returncode == 0, done.stdout
        return Path(config.log.dir), done.stdout

    run, said = launched("hangs", hangs=True)
    place = r"it is at \w+\.py:\d+ in \w+, from there at hanging\.py:\d+ in read; waiting in \w+"
    assert re.search(rf"nlm: rank 1 on \S+: no step has ended for 6 s: {place}", said), said
    assert "hangs: resuming after step 4" in said
    straight, _ = launched("straight", hangs=False)
    ours, theirs = (read_all(checkpoints(r)[-1] / "tensors") for r in (run, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def one_reads(rank: int, folder: Path) -> None:
    """Rank 0 waits for rank 1, whose main thread does something else while a thread of its own waits for rank 0, as
    when a checkpoint is written; a second thread looks at it, as a watch does."""
    apart, seen, waits = dist.new_group(backend="gloo"), folder / "seen", "all_reduce number 2 of group 0"
    dist.all_reduce(torch.ones(3))
    found: list[Doing] = []

    def look() -> None:
        while not (seen.exists() if rank == 1 else doing(folder, rank).waits_in == waits):
            time.sleep(0.1)
        found.append(doing(folder, rank))
        seen.touch()

    looker, writer = threading.Thread(target=look), threading.Thread(target=dist.barrier, args=(apart,))
    looker.start()
    if rank == 1:
        writer.start()
        looker.join()
    dist.all_reduce(torch.ones(3))
    looker.join()
    if rank == 0:
        writer.start()
    writer.join()
    assert found[0].waits_in == (None if rank == 1 else waits), found
    assert found[0].begun == {"0": 2 - rank}, found


def test_what_a_rank_does_is_what_its_main_thread_does(tmp_path: Path) -> None:
    run_ranks(2, one_reads, tmp_path)


def test_who_is_blamed() -> None:
    def waits(group: str, number: int) -> Doing:
        return Doing("mesh.py:60 in sum", {"0": 7, group: number}, f"all_reduce number {number} of group {group}")

    idle = Doing("rank.py:33 in rows", {"0": 7, "1": 4}, None)
    waiting = "waiting in all_reduce number 5 of group 1, at mesh.py:60 in sum: rank 0 and 1 more"
    expected = 1, f"it is at rank.py:33 in rows; {waiting}"
    assert blamed({0: waits("1", 5), 1: idle, 2: waits("1", 5)}) == expected
    rank, text = blamed({0: waits("1", 5), 1: waits("1", 4), 2: waits("2", 9)})
    assert rank == 1 and text.startswith("it is at mesh.py:60 in sum, in all_reduce number 4 of group 1; waiting in")
    behind = Doing("mesh.py:60 in sum", {"0": 6, "2": 9}, "all_reduce number 9 of group 2")
    assert blamed({0: behind, 1: Doing("rank.py:33 in rows", {"0": 7}, None), 2: waits("1", 5)})[0] == 1
