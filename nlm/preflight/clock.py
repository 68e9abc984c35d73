"""How far a rank's clock is from rank 0's, as NTP measures it (RFC 5905, section 8), by way of the store."""

import time
from collections.abc import Iterator

from nlm.config import Config
from nlm.preflight.check import All, Check, Column, Found, Place, Problem, having

ROUNDS = 8
"""Of which the shortest counts: what the store takes for the way there and back is what cannot be known."""
SKEW_MS = 500
"""Hosts that keep time by NTP are within some milliseconds of each other, over the internet within 100: half a second
says that one keeps none. Then logs of several hosts cannot be put in order, and file times go backwards."""


def measure(place: Place, found: Found) -> None:
    store, rank = place.store, place.rank
    if rank == 0:
        found |= {"skew_ms": 0.0, "skew_unsure_ms": 0.0}
        for other in range(1, place.world_size):
            for i in range(ROUNDS):
                store.get(f"clock/{other}/{i}")  # waits for it
                store.set(f"clock/{other}/{i}/is", str(time.time_ns()))
        return
    best = float("inf")
    for i in range(ROUNDS):
        asked, began = time.time_ns(), time.perf_counter_ns()
        store.set(f"clock/{rank}/{i}", "")
        its = int(store.get(f"clock/{rank}/{i}/is"))
        took = time.perf_counter_ns() - began
        if took < best:  # never the first, which waits until rank 0 has served the ranks before
            best = took
            found |= {"skew_ms": (asked + took / 2 - its) / 1e6, "skew_unsure_ms": took / 2 / 1e6}


def judge(found: All, config: Config) -> Iterator[Problem]:
    for rank, skew in having(found, "skew_ms").items():
        unsure = found[rank]["skew_unsure_ms"]
        if abs(skew) - unsure > SKEW_MS:
            came = f"{skew:+.0f} ms (±{unsure:.1g})"
            todo = "start chrony or ntpd on that host; where many ranks are off alike, on that of rank 0"
            yield Problem((rank,), "skew_ms", f"a clock within {SKEW_MS} ms of rank 0's", came, todo)


CLOCK = Check(
    "clock",
    measure,
    judge,
    (Column("skew_ms", "clock, ms", "{:+.1f}", worst=lambda values: max(values, key=abs)),),
    "see whether the store's host, that of MASTER_ADDR, is overloaded",
    together=True,
)
