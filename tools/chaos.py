"""A run that is killed again and again: `python tools/chaos.py`, on Linux.

Four ranks under torchrun (FSDP2 over two, tensor parallel over two) are killed with SIGKILL at random moments, some of
them during a save: one rank, whereupon torchrun starts all again by itself, or all of them and torchrun, which is then
started anew. After every kill each checkpoint is read and compared with its checksums. In the end the run must be bit
for bit what it is when nobody kills it: loss, statistics and batch of every step, parameters and optimizer state. Exit
code 1 if not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from launched import free_port
from parity import EPS, MODEL, write_tokens

from nlm.build import parse_config
from nlm.checkpoint import PARTIAL, checkpoints, verify
from nlm.compare import differences

STEPS_A_KILL = 5
DEADLINE_S = 300


class Launch:
    """A torchrun and its four ranks."""

    def __init__(self, config: Path, log: Path) -> None:
        self.config, self.log = config, log
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--max-restarts=1000"]
        command += [f"--master-port={free_port()}", "-m", "nlm", "train", str(self.config)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as out:
            self.agent = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def ranks(self) -> list[int]:
        """The ids of the processes that run now."""
        try:
            children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        except OSError:
            return []
        return [int(child) for child in children]

    def kill(self, everything: bool, draw: random.Random) -> bool:
        """-> whether there was something to kill."""
        ranks = self.ranks()
        if not ranks or self.agent.poll() is not None:
            return False
        for victim in [self.agent.pid, *ranks] if everything else [draw.choice(ranks)]:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:  # torchrun was quicker
                return everything
        if everything:
            self.agent.wait()
        return True

    def end(self) -> None:
        """Errors: RuntimeError with all that it said, for a run that failed."""
        if self.agent.wait(DEADLINE_S):
            raise RuntimeError(self.log.read_text())

    def close(self) -> None:
        self.kill(True, random.Random())


def write_config(folder: Path, name: str, steps: int) -> Path:
    config = parse_config(
        {
            "model": MODEL | {"scheme": {"name": "ngpt"}},
            "train": {"steps": steps, "batch_tokens": 512, "seq_len": 16},
            "optim": {"lr": 1e-3, "eps": EPS},
            "parallel": {"dp_shard": 2, "tp": 2, "microbatches": 2},
            "data": {"train": str(folder / "tokens")},
            "checkpoint": {"every": 2, "keep_last": 2},
            "log": {"dir": str(folder / name), "every": 1, "tensorboard": False},
        }
    )
    path = folder / f"{name}.toml"
    path.write_text(config.to_toml())
    return path


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(f"{PARTIAL}*"))


def wait(launch: Launch, ready: Callable[[], bool]) -> bool:
    """-> False when the run ends first. Errors: TimeoutError when neither happens."""
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        if launch.agent.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run did not get on for {DEADLINE_S} s")
        time.sleep(0.001)
    return True


def read_checkpoints(run: Path) -> int:
    """-> how many there are. Errors: ValueError for one that is damaged."""
    found = checkpoints(run)
    for checkpoint in found:
        try:
            verify(checkpoint)
        except ValueError:
            if checkpoint.exists():  # and was not just replaced by newer ones
                raise
    return len(found)


def chaos(folder: Path, kills: int, seed: int) -> Counter[str]:
    """-> how many kills there were of each kind. Errors: as of what it proves; RuntimeError for a run that fails."""
    write_tokens(folder)
    steps, log, run = STEPS_A_KILL * kills + 10, folder / "log", folder / "killed"
    with closing(Launch(write_config(folder, "straight", steps), log)) as straight:
        straight.end()
    with closing(Launch(write_config(folder, "killed", steps), log)) as launch:
        done = kill_again_and_again(launch, run, kills, random.Random(seed))
        launch.end()
    read_checkpoints(run)
    found = differences(run, folder / "straight", number_by_number=True)
    if bad := {kind: difference for kind, difference in found.items() if difference.first}:
        raise ValueError(f"not bit-identical: {bad}")
    return done


def kill_again_and_again(launch: Launch, run: Path, kills: int, draw: random.Random) -> Counter[str]:
    """`kills`, and some more of a rank that has just been started again."""
    done, n = Counter[str](), 0
    moments = draw.sample((["save", "step", "any"] * kills)[:kills], k=kills)  # a third of each, in any order
    while n < kills:
        moment, everything = moments[n], draw.random() < 0.4
        goal = STEPS_A_KILL * n + draw.randrange(STEPS_A_KILL)  # the run gets on, whatever happens to it
        if not wait(launch, lambda: last_step(run) >= goal):  # noqa: B023
            break
        match moment:
            case "any":
                time.sleep(draw.uniform(0, 1))
            case "save":
                while wait(launch, lambda: saving(run)):
                    time.sleep(draw.uniform(0, 0.03))
                    if saving(run):  # still, or again
                        break
        inside = saving(run)
        if not launch.kill(everything, draw):
            continue
        kind = ("all ranks" if everything else "one rank") + (", during a save" if inside else "")
        done[kind] += 1
        n += 1
        whole = read_checkpoints(run)
        print(f"kill {n}: {kind}, at step {last_step(run)}; checkpoints, all whole: {whole}", flush=True)
        if everything:
            launch.start()
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 6))
            done["one rank, while it starts"] += launch.kill(everything=False, draw=draw)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = chaos(Path(folder), options.kills, options.seed)
        except (RuntimeError, TimeoutError, ValueError) as error:
            print(error)
            return 1
    print(f"{done.total()} kills in {time.monotonic() - began:.0f} s, and bit-identical: {dict(done)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
