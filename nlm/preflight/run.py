"""The checks, one after the other on all ranks at once, and what rank 0 makes of them: a table, and who is unfit.

Every rank ends a check at its deadline, says at the store what it has found by then, and waits there, not in a
collective, for rank 0 to let all go on: so whoever does not come is known by name.
"""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch._C._distributed_c10d import HashStore, PrefixStore, Store  # torch.distributed has them, unknown to mypy
from torch.distributed.distributed_c10d import _get_default_store

from nlm.config import Config
from nlm.parallel.launch import process_group, within
from nlm.parallel.watch import LIMITS, Limits, until
from nlm.preflight.check import Check, Column, Found, Place, Problem, named
from nlm.preflight.clock import CLOCK
from nlm.preflight.disk import DISK, READ_BACK, TOKEN
from nlm.preflight.health import HEALTH
from nlm.preflight.links import ALONG_AXES, WITH_NEXT
from nlm.preflight.product import PRODUCT
from nlm.runtime import pick_device

CHECKS = (HEALTH, PRODUCT, TOKEN, DISK, READ_BACK, CLOCK, ALONG_AXES, WITH_NEXT)
"""Those in which ranks wait for each other come last."""
CHECK_S = 120
"""For one of them: the longest, NCCL's first all-reduce on thousands of ranks, takes half a minute."""
ROWS = 64
"""Ranks that have a row each; of more, each host has one, of its worst."""
LINES = 40
"""Problems that are listed."""


class Unfit(OSError):
    """Ranks, hosts or links that cannot carry the run; a line for each problem."""


def preflight(config: Config, limits: Limits = LIMITS, check_s: float = CHECK_S) -> None:
    """Rank 0 prints the table. Errors, the same on every rank: Unfit; and those of joining the others (process_group),
    where it is the config, the code or a version that differs."""
    device = pick_device()
    # NCCL ends the process of a collective that is beyond its own limit: let the check's be the first to be over.
    soon = config.faults.model_copy(update={"hang_minutes": 2 * check_s / 60})
    config = config.model_copy(update={"faults": soon})
    with process_group(config, device, replace(limits, collective_s=check_s)):
        said = _checked(config, device, check_s)
        if said:
            raise Unfit(said)


def _checked(config: Config, device: torch.device, check_s: float) -> str:
    """-> what all ranks have to say: nothing where all is well."""
    joined = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    store: Store = _get_default_store() if joined else HashStore()
    store = PrefixStore("preflight", store)
    late: list[int] = []
    everything: dict[int, Found] = {rank: {} for rank in range(world_size)} if rank == 0 else {}
    ran = []
    for check in CHECKS:
        # A thread that is left behind may wait in its client of the store for ever, and no other can use it.
        client: Store = store.clone()  # type: ignore[attr-defined]
        client.set_timeout(timedelta(seconds=2 * check_s))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        place = Place(config, device, client, rank, world_size, local_rank, socket.gethostname())
        store.set(f"{check.name}/{rank}", json.dumps(_found(check, place, check_s)))
        if rank:
            # Where rank 0 itself falls silent, the watch of the process group says so.
            until(lambda name=check.name: store.check([f"{name}/next"]))  # type: ignore[misc]
            goes_on = store.get(f"{check.name}/next") == b"go"
        else:
            ran.append(check)
            keys = [f"{check.name}/{other}" for other in range(world_size)]
            until(lambda keys=keys: store.check(keys), 2 * check_s)  # type: ignore[misc]
            for other, key in enumerate(keys):
                if store.check([key]):
                    everything[other] |= json.loads(store.get(key))
                else:
                    late.append(other)
            failed = late or (check.together and any(f"error/{check.name}" in f for f in everything.values()))
            goes_on = not failed
            store.set(f"{check.name}/next", "go" if goes_on else "stop")
        if not goes_on:
            break
    if rank == 0:
        problems = list(_problems(everything, late, ran, config))
        _show(everything, ran, [problem for _, problem in problems])
        store.set("said", _text(everything, problems))
    until(lambda: store.check(["said"]))
    return store.get("said").decode()


def _found(check: Check, place: Place, check_s: float) -> Found:
    found: Found = {}

    def measure() -> None:
        if place.device.type == "cuda":
            torch.cuda.set_device(place.device)  # a thread has its own
        check.measure(place, found)

    try:
        within(check_s, measure)
    except TimeoutError:
        return found | {f"error/{check.name}": f"no end within {check_s:g} s"}
    except Exception as error:
        return found | {f"error/{check.name}": f"{type(error).__name__}: {error}"}
    return found


def _problems(
    everything: dict[int, Found], late: list[int], ran: list[Check], config: Config
) -> Iterator[tuple[str, Problem]]:
    for check in ran:
        for problem in check.judge(everything, config):
            yield check.name, problem
        for rank, its in everything.items():
            if error := its.get(f"error/{check.name}"):
                key = check.columns[0].key if check.columns else ""
                yield check.name, Problem((rank,), key, "it to come to its end", error, check.todo)
    if late:
        todo = "see what that process printed, and whether its host still answers"
        yield ran[-1].name, Problem(tuple(late), "", "an answer", "none", todo)


def _text(everything: dict[int, Found], problems: list[tuple[str, Problem]]) -> str:
    lines = [
        f"{named(everything, problem.ranks)}: {check}: expected {problem.expected}; came {problem.came}; {problem.todo}"
        for check, problem in problems
    ]
    more = [f"and {len(lines) - LINES} problems more"] if len(lines) > LINES else []
    return "\n".join(["preflight failed:", *lines[:LINES], *more]) if lines else ""


def _show(everything: dict[int, Found], ran: list[Check], problems: list[Problem]) -> None:
    """A row a rank, or a host; only columns of which something is known. What is to blame is marked with a "!"."""
    columns = [c for check in ran for c in check.columns if any(c.key in its for its in everything.values())]
    hosts: dict[str, list[int]] = {}
    for rank, its in everything.items():
        hosts.setdefault(its.get("host", "?"), []).append(rank)
    each = len(everything) <= ROWS
    rows = [(host, [rank]) for host, ranks in hosts.items() for rank in ranks] if each else list(hosts.items())
    table = Table("rank" if each else "ranks", "host", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.heading, justify="right")
    blamed = {(rank, problem.key) for problem in problems for rank in problem.ranks}
    for host, ranks in sorted(rows, key=lambda row: row[1]):
        name = str(ranks[0]) if each else f"{ranks[0]} … {ranks[-1]} ({len(ranks)})"
        table.add_row(name, host, *(_cell(column, ranks, everything, blamed) for column in columns))
    first = everything[0]
    on = [first.get("device", "?"), *(f"{key} {first[key]}" for key in ("driver", "cuda", "nccl") if key in first)]
    console = Console(width=None if Console().is_terminal else 200)
    console.print(
        f"preflight: {len(everything)} rank{'s' * (len(everything) > 1)} on {len(hosts)} host{'s' * (len(hosts) > 1)}, "
        f"torch {torch.__version__}, {', '.join(on)}",
        highlight=False,
    )
    console.print(table, highlight=False)


def _cell(column: Column, ranks: list[int], everything: dict[int, Found], blamed: set[tuple[int, str]]) -> str:
    values = [everything[rank][column.key] for rank in ranks if column.key in everything[rank]]
    text = column.form.format(column.scale * column.worst(values)) if values else "–"
    return f"[red]{text}![/red]" if any((rank, column.key) in blamed for rank in ranks) else text
