"""How fast ranks talk: an all-reduce along each axis of the mesh, and every rank with the next one."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from nlm.config import Config
from nlm.mesh import AXES, Mesh
from nlm.plan.gpus import GPUS, Machine, find
from nlm.preflight.check import All, Check, Column, Found, Place, Problem, far_below, having, named
from nlm.preflight.product import synchronize

BYTES = {"cpu": 2**21, "cuda": 2**28}
"""Of a message: large enough that what is timed is bandwidth. NCCL reaches its best at some 100 MiB."""
TIMES = 6
"""The fastest of which counts: the first opens the connections."""
SLOW_SHARE = {"cpu": 0.2, "cuda": 0.5}
"""Of the median of links of the same kind. A cable or adapter that is broken has a half, or a quarter, of its lanes;
between CPUs bandwidth is a question of who has the cores."""
PEAK_SHARE = 0.5 * Machine.efficiency
"""Of NVLink's data sheet: half of what the planner takes collectives to reach."""
BRIDGED = ("H100-PCIe", "H100-NVL", "H200-NVL", "A100-PCIe", "A100-PCIe-40")
"""Cards whose NVLink is a bridge between some of them, if there is one: PCIe is all that can be expected."""

TODO = "test that link alone (nccl-tests, ib_write_bw, iperf3); see its cable, port and adapter, and NCCL_DEBUG=INFO"


def along_axes(place: Place, found: Found) -> None:
    """[elements] summed up by all groups of an axis at once, as in a step. Bandwidth is that of the bus, as nccl-tests
    count it: 2 (n - 1) / n times the bytes, which no way of summing up can send less of."""
    x = torch.zeros(BYTES[place.device.type] // 4, device=place.device)
    mesh = Mesh(place.config.parallel, place.device)
    for axis in AXES:
        if group := mesh.group(axis):
            n = mesh.sizes[axis]
            found[f"group/{axis}"] = dist.get_process_group_ranks(group)
            took = shortest(place.device, lambda group=group: dist.all_reduce(x, group=group))  # type: ignore[misc]
            found[f"all_reduce/{axis}"] = 2 * (n - 1) / n * BYTES[place.device.type] / took


def with_next(place: Place, found: Found) -> None:
    """[elements] there and back; `to_next` is of the link to the rank above, round the ring."""
    n, rank = place.world_size, place.rank
    x = torch.zeros(BYTES[place.device.type] // 4, device=place.device)
    for link in links(rank, n):
        first, second = link, (link + 1) % n

        def there_and_back(first: int = first, second: int = second) -> None:
            if rank == first:
                dist.send(x, second)
                dist.recv(x, second)
            else:
                dist.recv(x, first)
                dist.send(x, first)

        found["to_next" if rank == first else "from_last"] = (
            2 * BYTES[place.device.type] / shortest(place.device, there_and_back)
        )


def links(rank: int, n: int) -> list[int]:
    """The links of a ring of n ranks that `rank` is an end of, by their lower end, in an order in which all ranks can
    take theirs without waiting in a circle: first the even ones, then the odd ones, then one that is left over."""
    if n < 2:
        return []
    mine = {rank, (rank - 1) % n} if n > 2 else {0}
    return sorted(mine, key=lambda link: 2 if n % 2 and link == n - 1 else link % 2)


def shortest(device: torch.device, call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(TIMES):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def judge_axes(found: All, config: Config) -> Iterator[Problem]:
    for axis in AXES:
        key = f"all_reduce/{axis}"
        groups = {ranks[0]: ranks for ranks in having(found, f"group/{axis}").values()}
        # A group is as fast as its slowest member makes all of them.
        speeds = {
            first: min(having({rank: found[rank] for rank in ranks if rank in found}, key).values(), default=0.0)
            for first, ranks in groups.items()
        }
        if not any(speeds.values()):
            continue
        usual, slow = far_below(speeds, SLOW_SHARE[_kind(found)])
        for first, its in speeds.items():
            ranks = tuple(rank for rank in groups[first] if rank in found)
            what = f"of an all-reduce along {axis}"
            if problem := _judged(found, ranks, key, what, its, usual if first in slow else None):
                yield problem


def judge_next(found: All, config: Config) -> Iterator[Problem]:
    """Links within a host and between hosts are each compared with their own kind. A rank all of whose links are slow
    is to blame for them, else both ends are."""
    n = len(found)
    all_links = {
        link: found[link].get("to_next", 0.0) for link in (range(n) if n > 2 else range(n - 1)) if link in found
    }
    if not any(all_links.values()):
        return

    def ends(link: int) -> tuple[int, int]:
        return link, (link + 1) % n

    slow: dict[int, float] = {}
    for within in (True, False):
        kind = {link: its for link, its in all_links.items() if _one_host(found, ends(link)) == within}
        best: dict[int, float] = {}
        for link, its in kind.items():
            for rank in ends(link):
                best[rank] = max(its, best.get(rank, 0.0))
        if best:
            usual, _ = far_below(best, 1)
            slow |= {link: usual for link, its in kind.items() if its < SLOW_SHARE[_kind(found)] * usual}
    of = {rank: [link for link in all_links if rank in ends(link)] for rank in found}
    guilty = [rank for rank in found if n > 2 and of[rank] and all(link in slow for link in of[rank])]
    for rank in guilty:
        link = min(of[rank], key=all_links.__getitem__)
        what = f"to its neighbours, {named(found, sorted({*ends(link)} - {rank}))} among them"
        if problem := _judged(found, (rank,), "to_next", what, all_links[link], slow[link]):
            yield problem
    for link, its in all_links.items():
        if not set(ends(link)) & set(guilty):
            what = "from one to the other"
            if problem := _judged(found, ends(link), "to_next", what, its, slow.get(link)):
                yield problem


def _judged(found: All, ranks: tuple[int, ...], key: str, what: str, its: float, usual: float | None) -> Problem | None:
    """`usual` is the median of its like, where it is far below that."""
    came = f"{its / 1e9:.3g} GB/s" if its else "no end"
    if usual is not None:
        share = SLOW_SHARE[_kind(found)]
        expected = f"at least {share:.0%} of the median of its like, {usual / 1e9:.3g} GB/s, {what}"
        return Problem(ranks, key, expected, came, TODO)
    peak = nvlink(found[ranks[0]].get("device", "")) if _one_host(found, ranks) else None
    if peak and its < PEAK_SHARE * peak:
        expected = f"at least {PEAK_SHARE:.0%} of the {peak / 1e9:g} GB/s of its data sheet {what}"
        return Problem(ranks, key, expected, came, TODO)
    return None


def nvlink(device: str) -> float | None:
    """Bytes/s, or None for a device that is not in the planner's table."""
    gpu = find(device)
    if gpu is None:
        return None
    return Machine.host_bandwidth if any(gpu is GPUS[name] for name in BRIDGED) else gpu.link_bandwidth


def _one_host(found: All, ranks: tuple[int, ...]) -> bool:
    return len({found[rank].get("host") for rank in ranks if rank in found}) == 1


def _kind(found: All) -> str:
    return "cuda" if any("gpus" in its for its in found.values()) else "cpu"


ALONG_AXES = Check(
    "all-reduce",
    along_axes,
    judge_axes,
    tuple(Column(f"all_reduce/{axis}", f"{axis}, GB/s", "{:.3g}", 1e-9) for axis in AXES),
    TODO,
    together=True,
)
WITH_NEXT = Check(
    "point to point", with_next, judge_next, (Column("to_next", "to next, GB/s", "{:.3g}", 1e-9),), TODO, together=True
)
