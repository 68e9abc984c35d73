"""Joining the other ranks: rendezvous, agreement, leave.

Ranks meet at torch's key-value store, which the launcher's agent hosts (torchrun) or else rank 0. There they compare
config, code and versions before anything is computed; only where these differ are the keys of all ranks read.
"""

import json
import os
import platform
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed has them, unknown to mypy
from torch.distributed.rendezvous import rendezvous

from nlm.config import Config, ParallelConfig, dotted
from nlm.parallel.gloo import one_thread_each
from nlm.parallel.watch import LIMITS, Limits, Me, RankLost, Watch, host_of, until

T = TypeVar("T")


@contextmanager
def process_group(config: Config, device: torch.device, limits: Limits = LIMITS) -> Iterator[Callable[[], None]]:
    """Joins the ranks that a launcher (torchrun, deepspeed, srun or mpirun with RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT set) started; leaves them at the end. One process without a launcher joins nothing.

    -> what to call at the end of every step, by which a hang is noticed.

    Errors, on every rank: ValueError for environment variables that are missing or contradict each other, for another
    number of ranks than the mesh needs, and for ranks that differ in config, code or versions. ConnectionError for a
    store that cannot be reached and a rank that does not arrive; RankLost, which is one, for a rank that ends, falls
    silent or makes the others wait inside the context: where the main thread hangs in a collective then, the process
    ends with exit code 1.
    An exception of one's own passes through, after the other ranks have been told. Its `told` is true where another
    rank, which raises the very same, prints it for this machine.
    """
    me = _launched()
    if me is None:
        _require_ranks(config.parallel, 1)
        yield lambda: None
        return
    what = _what_runs(config)
    store = _join(me, what, limits)
    hang_s = 60 * config.faults.hang_minutes
    watch = Watch(store, me, limits, hang_s, Path(config.log.dir) / "hang")
    try:
        _agree(store, me, what, limits)
        _require_ranks(config.parallel, me.world_size)
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            if me.local_rank >= (gpus := torch.cuda.device_count()):
                raise ValueError(f"LOCAL_RANK: expected less than {gpus}, the GPUs of {me.host}, got {me.local_rank}")
            torch.cuda.set_device(me.local_rank)
        timeout = timedelta(seconds=hang_s + limits.collective_s)
        # FSDP2 of torch 2.13 itself calls what torch 2.13 has renamed.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        one_thread_each()
        dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.world_size, timeout=timeout)
        yield watch.step
        store.add("done", 1)
        until(lambda: store.add("done", 0) == me.world_size)  # nobody takes down what another still needs
        dist.destroy_process_group()
    except BaseException as error:
        fault = watch.report(error)
        if me.hosts_store:
            time.sleep(limits.grace_s)  # the others learn of the fault from the store, which ends with this process
        if dist.is_initialized():
            dist.destroy_process_group()
        if fault is None:
            raise
        raise RankLost(str(fault)) from None
    finally:
        watch.stop()
    with suppress(dist.DistError):  # all is done: whoever waits no longer for this rank is in its right
        store.add("left", 1)
        if me.hosts_store:
            until(lambda: store.add("left", 0) == me.world_size, limits.grace_s)


def _launched() -> Me | None:
    """Errors: ValueError with everything that is wrong with a launcher's environment variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    found = {name: os.environ.get(name, "") for name in (*names, "MASTER_ADDR")}
    if not (found["RANK"] or found["WORLD_SIZE"] or found["LOCAL_RANK"]):
        return None
    problems = [f"{name}: missing; a launcher sets it" for name, value in found.items() if not value]
    problems += [
        f"{name}: expected a whole number, got {found[name]!r}"
        for name in names
        if found[name] and not found[name].isdecimal()
    ]
    if not problems and not int(found["RANK"]) < int(found["WORLD_SIZE"]):
        problems.append(f"RANK: expected less than WORLD_SIZE = {found['WORLD_SIZE']}, got {found['RANK']}")
    if problems:
        problems.append("start the ranks with `torchrun`, or unset what is left of another launch")
        raise ValueError("\n".join(problems))
    rank, world_size, local_rank, port = (int(found[name]) for name in names)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Me(rank, world_size, local_rank, found["MASTER_ADDR"], port, agent, socket.gethostname())


def _require_ranks(parallel: ParallelConfig, came: int) -> None:
    needed = parallel.ranks
    if needed == came:
        return
    sizes = f"{parallel.pp} · {parallel.dp_replicate} · {parallel.dp_shard} · {parallel.tp} = {needed}"
    raise ValueError(
        f"the mesh needs pp · dp_replicate · dp_shard · tp = {sizes} ranks, but there {'is' if came == 1 else 'are'} "
        f"{came}; type `torchrun --nproc-per-node {needed} -m nlm train CONFIG`, or set parallel.pp, .dp_replicate, "
        f".dp_shard and .tp to a product of {came}"
    )


_joins: Counter[str] = Counter()
"""How often this process has met others at which store."""


def _join(me: Me, what: Mapping[str, Any], limits: Limits) -> Store:
    """The store of this run, with this rank entered. Errors: ConnectionError."""
    hint = "choose another MASTER_PORT, the same for all ranks (torchrun: --master-port)"
    if not me.hosts_store:
        _await_server(me, limits)
    try:
        tcp = within(2 * limits.answer_s, lambda: _connect(me, limits.answer_s))
        # Of a launch before a restart, or of an earlier run of these processes, nothing is in the way. Only an agent's
        # store survives a restart; where rank 0 hosts it, agents need not agree how often they have started ranks.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if me.agent else "0"
        store = PrefixStore(f"nlm/{me.world_size}/{restart}/{_joins[me.store]}", tcp)
        _joins[me.store] += 1
        # Rank 0 writes as soon as it hosts a store: a store without its digest is another's.
        if not (me.rank == 0 or me.agent or until(lambda: store.check(["digest"]), limits.answer_s)):
            raise TimeoutError
        if store.add(f"beat/{me.rank}", 1) > 1:
            raise ConnectionError(f"{me.store}: another run, which has a rank {me.rank} too, is there; {hint}")
        store.set(f"host/{me.rank}", me.host)
        if me.rank == 0:
            store.set("what/0", json.dumps(what))
            store.set("digest", _digest(what))
    except TimeoutError:
        raise ConnectionError(f"{me.store}: what listens there is not the store of this run; {hint}") from None
    except dist.DistError as error:
        verb = "listen" if me.hosts_store else "join the other ranks"
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"{me.store}: rank {me.rank} on {me.host} cannot {verb} there: {reason}; {hint}"
        ) from None
    return store


def _await_server(me: Me, limits: Limits) -> None:
    """Errors: ConnectionError. A plain socket, since torch's client prints a stack a try."""
    refusal = ""

    def listens() -> bool:
        nonlocal refusal
        try:
            socket.create_connection((me.store_address, me.store_port), timeout=limits.answer_s).close()
        except OSError as error:
            refusal = str(error)
            return False
        return True

    if not until(listens, limits.join_s):
        host = "the launcher's agent" if me.agent else "rank 0"
        raise ConnectionError(
            f"{me.store}: rank {me.rank} on {me.host} waited {limits.join_s:g} s for the store there ({refusal}); "
            f"did {host}, which hosts it, start, and are MASTER_ADDR and MASTER_PORT where it did?"
        )


@cache  # a second run in this process meets at the same store
def _connect(me: Me, answer_s: float) -> Store:
    # Given a world size of 1, rank 0 does not wait here for the others: that would end without saying who is missing.
    store, _, _ = next(rendezvous("env://", rank=me.rank, world_size=1, timeout=timedelta(seconds=answer_s)))
    return store


def _agree(store: Store, me: Me, what: Mapping[str, Any], limits: Limits) -> None:
    """Waits for all ranks. Errors, the same on each: ConnectionError for ranks that are missing, ValueError for ranks
    that run something else."""
    here = until(lambda: store.check(["digest"]), limits.join_s)
    if here and store.get("digest").decode() != _digest(what):
        store.set(f"what/{me.rank}", json.dumps(what))
        store.add("differing", 1)
    if here and store.add("arrived", 1) == me.world_size:
        store.compare_set("verdict", "", f"ValueError {_differences(store, me)}" if store.add("differing", 0) else "go")
    if not until(lambda: store.check(["verdict"]), limits.join_s if here else 0):
        missing = (f"rank {rank}" for rank in range(me.world_size) if not store.add(f"beat/{rank}", 0))
        text = f"{_listed(missing)} of {me.world_size} did not arrive within {limits.join_s:g} s"
        store.compare_set("verdict", "", f"ConnectionError {text}; see what those processes printed, if they started")
    kind, _, text = store.get("verdict").decode().partition(" ")
    if kind != "go":
        raise {"ValueError": ValueError, "ConnectionError": ConnectionError}[kind](text)


def _what_runs(config: Config) -> dict[str, Any]:
    """What must not differ between ranks: the config, the code (and in it nlm's version), what it runs on."""
    package = Path(__file__).parents[1]
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        **dict(dotted(config.model_dump(mode="json", exclude_none=True))),
        **{
            f"sha256 of {path.relative_to(package.parent)}": sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted(package.rglob("*.py"))
        },
    }


def _digest(what: Mapping[str, Any]) -> str:
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _differences(store: Store, me: Me) -> str:
    """One line for all ranks that differ from rank 0 in the same way."""
    reference = json.loads(store.get("what/0"))
    ranks: dict[str, list[str]] = {}
    for rank in range(1, me.world_size):
        if store.check([f"what/{rank}"]):
            theirs = json.loads(store.get(f"what/{rank}"))
            differ = [key for key in reference | theirs if reference.get(key) != theirs.get(key)]
            text = _listed(f"{key} is {theirs.get(key)!r} and not {reference.get(key)!r}" for key in differ)
            ranks.setdefault(text, []).append(f"{rank} on {host_of(store, rank)}")
    lines = [f"rank {_listed(names)}: {text}" for text, names in ranks.items()]
    head = f"ranks run something else than rank 0 on {host_of(store, 0)}; give all the same config, code and versions"
    return "\n".join([head, *lines])


def _listed(items: Iterable[str], most: int = 8) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def within(limit_s: float, call: Callable[[], T]) -> T:
    """Errors: TimeoutError; the call, in C++ without end, is left behind in a daemon thread."""
    results: list[T | Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not results:
        raise TimeoutError
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]
