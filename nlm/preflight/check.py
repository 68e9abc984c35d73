"""What a check is: what every rank measures, what must hold of all ranks together, what the table shows of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median_high
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has it, unknown to mypy

from nlm.config import Config

Found = dict[str, Any]
"""What a rank has found: numbers and words, under names that are the checks' own. What it cannot know is not there."""
All = Mapping[int, Found]
"""By rank."""


class Place(NamedTuple):
    """This rank, and a client of the store that nobody else waits in."""

    config: Config
    device: torch.device
    store: Store
    rank: int
    world_size: int
    local_rank: int
    host: str


class Problem(NamedTuple):
    """`key` is the number or word of these ranks that is to blame."""

    ranks: tuple[int, ...]
    key: str
    expected: str
    came: str
    todo: str


class Column(NamedTuple):
    """`worst` of several ranks stands for a host. `scale` turns what was found into the heading's unit."""

    key: str
    heading: str
    form: str = "{:.3g}"
    scale: float = 1
    worst: Callable[[Iterable[float]], float] = min


@dataclass(frozen=True)
class Check:
    """`measure` fills what this rank finds, piece by piece: a deadline may end it. `judge` is rank 0's.

    `together`: ranks wait for each other in collectives, and where one has failed the next cannot be run.
    `todo` is for where it does not come to an end, or ends with an error.
    """

    name: str
    measure: Callable[[Place, Found], None]
    judge: Callable[[All, Config], Iterator[Problem]]
    columns: tuple[Column, ...]
    todo: str
    together: bool = False


def named(found: All, ranks: Iterable[int], most: int = 8) -> str:
    ranks = list(ranks)
    text = ", ".join(f"rank {rank} on {found[rank].get('host', 'a host unknown')}" for rank in ranks[:most])
    return text + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


def having(found: All, key: str) -> dict[int, Any]:
    return {rank: its[key] for rank, its in found.items() if key in its}


def unlike_most(values: Mapping[int, Any]) -> tuple[Any, list[int]]:
    """-> the value of most ranks (of as many, that of the lowest) and the ranks with another."""
    usual = max(values.values(), key=list(values.values()).count)
    return usual, [rank for rank, value in values.items() if value != usual]


def far_below(values: Mapping[int, float], share: float) -> tuple[float, list[int]]:
    """-> the median (of two, the higher: one of them must be able to be the slow one) and who has less of it than
    `share`."""
    usual = median_high(values.values())
    return usual, [rank for rank, value in values.items() if value < share * usual]
