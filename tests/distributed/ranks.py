"""Ranks in processes of their own: a function as every rank of a small gloo group, `nlm train`, or a command under
torchrun."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launched import PROCESSES, free_port

from nlm.cli import main
from nlm.parallel.gloo import one_thread_each

DEADLINE_S = 240


def torchrun(ranks: int, *command: str | Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """A script and its arguments, or `-m` and a module, as so many ranks; what they said is in `stdout`."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE_S,
    )


def start(ranks: int, config: Path, said: Path, change: Callable[[], None] | None = None) -> list[BaseProcess]:
    """`nlm train` as so many ranks without a launcher, after `change` in each; what they say is in the file `said`."""
    processes: list[BaseProcess] = [
        PROCESSES.Process(target=_train, args=(rank, ranks, port, config, said, change), daemon=True)
        for port in [free_port()]
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def codes(processes: Sequence[BaseProcess]) -> list[int | None]:
    """With which they end; None for those that do not."""
    for process in processes:
        process.join(DEADLINE_S)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return ended


def _train(rank: int, ranks: int, port: int, config: Path, said: Path, change: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    console = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in 1, 2:
        os.dup2(console, fd)
    if change is not None:
        change()
    sys.exit(main(["train", str(config)]))


def run_ranks(n: int, function: Callable[..., None], *arguments: Any) -> None:
    """Errors: AssertionError with what the first rank that failed said, or for ranks that do not end."""
    port = free_port()
    results = PROCESSES.SimpleQueue()
    processes = [
        PROCESSES.Process(target=_rank, args=(rank, n, port, results, function, arguments), daemon=True)
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_S)
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    said = []
    while not results.empty():
        said.append(results.get())
    assert not said, "\n".join(said)
    assert not late, f"ranks {late} did not end within {DEADLINE_S} s"
    assert all(process.exitcode == 0 for process in processes)


def _rank(
    rank: int, n: int, port: int, results: Any, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}
    one_thread_each()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=n)
    try:
        function(rank, *arguments)
        dist.barrier()
    except BaseException:
        results.put(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
    dist.destroy_process_group()
