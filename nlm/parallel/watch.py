"""Watching the other ranks: a rank that dies, freezes or raises ends the others, and they say which it was. So does
one that makes them wait for ever.

Each tells in a heartbeat at torch's key-value store that it lives, and watches the next one's. A rank reads and writes
a fixed number of keys, however many ranks there are; only when all hang, one reads what each of them does.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import Store  # torch.distributed has it, unknown to mypy

from nlm.parallel.hang import Doing, blamed, doing
from nlm.parallel.ranklog import complain


@dataclass(frozen=True)
class Limits:
    """How long what may take, in seconds.

    A heartbeat needs Python's GIL: `silent_s` must be longer than any call into C++ that keeps it.
    """

    join_s: float = 300  # for every rank to arrive
    answer_s: float = 20  # for a server that listens to prove that it is this run's store
    beat_s: float = 2  # between two heartbeats of a rank, and between two looks at its neighbour's
    silent_s: float = 30  # without a heartbeat, or an answer of the store, until that counts as dead
    grace_s: float = 5  # for what all ranks must still do after a fault; longer than two heartbeats
    collective_s: float = 300  # beyond faults.hang_minutes: torch's own limit for one collective, before the first step


LIMITS = Limits()


class RankLost(ConnectionError):
    """Another rank ended or fell silent, and this one cannot go on."""

    told = False  # every rank says so: their outputs may lie in different files, and the other can say nothing


class Me(NamedTuple):
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    store_address: str
    store_port: int
    agent: bool
    host: str

    @property
    def hosts_store(self) -> bool:
        return self.rank == 0 and not self.agent

    @property
    def store(self) -> str:
        return f"{self.store_address}:{self.store_port}"


class Fault(NamedTuple):
    """Which rank (None: the launcher's agent) brought the run down, and how."""

    rank: int | None
    host: str
    text: str

    def __str__(self) -> str:
        return self.text if self.rank is None else f"rank {self.rank} on {self.host}: {self.text}"


class Watch:
    """Two daemon threads: one that gives and reads heartbeats, and one that ends the process on a fault if the main
    thread does not, since that may hang in a collective for ever. The second never asks the store: the store's host
    may freeze, and a client that waits for its answer cannot be woken."""

    def __init__(self, store: Store, me: Me, limits: Limits, hang_s: float, dumps: Path) -> None:
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # a client of its own: torch waits in the other
        self.me, self.limits, self.hang_s, self.dumps = me, limits, hang_s, dumps
        self.steps = 0
        self.fault: Fault | None = None
        self.store_host = me.host if me.agent else host_of(store, 0)
        self.known, self.reporting, self.stopped = Event(), Event(), Event()
        self.answers = 0
        self.threads = [Thread(target=target, daemon=True) for target in (self._beat, self._judge)]
        for thread in self.threads:
            thread.start()

    def step(self) -> None:
        """The main thread has ended a step. Once it has called this, it is to do so again within `hang_s`."""
        self.steps += 1

    def stop(self) -> None:
        self.stopped.set()
        self.threads[0].join(self.limits.grace_s)

    def report(self, error: BaseException) -> Fault | None:
        """The fault of which `error` is a consequence; or None when it is this rank's own, and the others know."""
        limits, me = self.limits, self.me
        if of_a_collective(error) and self.known.wait(limits.silent_s + 3 * limits.beat_s):
            self.reporting.set()
            return self.fault
        self.reporting.set()
        own = Fault(me.rank, me.host, f"{type(error).__name__}: {error}")
        try:
            self._learn(publish(self.store, own))
        except dist.DistError:
            self._learn(own)  # nobody is left to hear of it
        first = self.fault or own
        same = first.text == own.text and first.rank != me.rank
        error.told = same and (first.host == me.host or me.local_rank != 0)  # type: ignore[attr-defined]
        return None

    def _beat(self) -> None:
        me, next_rank = self.me, (self.me.rank + 1) % self.me.world_size
        seen, missed = 0, 0
        steps, still = 0, 0
        try:
            while not self.stopped.wait(self.limits.beat_s) and not self.known.is_set():
                self.store.add(f"beat/{me.rank}", 1)
                if self.store.check(["fault"]):
                    self._learn(Fault(*json.loads(self.store.get("fault"))))
                    return
                beat = self.store.add(f"beat/{next_rank}", 0)  # 0: it has not joined, which _agree waits for
                missed = missed + 1 if beat == seen and beat else 0
                seen = beat
                self.answers += 1
                if missed * self.limits.beat_s >= self.limits.silent_s:
                    text = f"no heartbeat for {self.limits.silent_s:g} s: it was killed, is frozen or cannot be reached"
                    self._learn(publish(self.store, Fault(next_rank, host_of(self.store, next_rank), text)))
                still = still + 1 if self.steps == steps else 0
                steps = self.steps
                if steps and still * self.limits.beat_s >= self.hang_s:
                    self._explain_hang()
                    still = 0
        except dist.DistError:
            self._learn(self._store_fault("is gone"))

    def _explain_hang(self) -> None:
        """All ranks come here; the first waits for what the others say and publishes who it was."""
        ranks = range(self.me.world_size)
        self.store.set(f"doing/{self.me.rank}", doing(self.dumps, self.me.rank).to_json())
        if self.store.add("hanging", 1) == 1:
            until(lambda: self.store.check([f"doing/{rank}" for rank in ranks]), self.limits.silent_s / 2)
            said = (rank for rank in ranks if self.store.check([f"doing/{rank}"]))
            rank, text = blamed({rank: Doing.from_json(self.store.get(f"doing/{rank}")) for rank in said})
            text = f"no step has ended for {self.hang_s:g} s: {text}; see {self.dumps}"
            self._learn(publish(self.store, Fault(rank, host_of(self.store, rank), text)))

    def _judge(self) -> None:
        answers, missed = 0, 0
        # Counting looks, not seconds: a process that was frozen itself does not take the others for dead.
        while not self.known.wait(self.limits.beat_s):
            if self.stopped.is_set():
                return
            missed = missed + 1 if self.answers == answers else 0
            answers = self.answers
            if missed * self.limits.beat_s >= self.limits.silent_s:
                self._learn(self._store_fault(f"has not answered for {self.limits.silent_s:g} s"))
        # The main thread may be about to raise the same error itself, and what it does after one may hang as well.
        if not (self.reporting.wait(self.limits.grace_s) and self.stopped.wait(3 * self.limits.grace_s)):
            complain(str(self.fault))
            os._exit(1)

    def _learn(self, fault: Fault) -> None:
        self.fault = self.fault or fault
        self.known.set()

    def _store_fault(self, what: str) -> Fault:
        if self.me.agent:
            return Fault(None, "", f"the launcher's agent, which hosts the store at {self.me.store}, {what}")
        return Fault(0, self.store_host, f"it hosts the store at {self.me.store}, which {what}")


def host_of(store: Store, rank: int) -> str:
    return store.get(f"host/{rank}").decode()


def publish(store: Store, fault: Fault) -> Fault:
    """The first fault that any rank published."""
    return Fault(*json.loads(store.compare_set("fault", "", json.dumps(fault))))


def of_a_collective(error: BaseException | None) -> bool:
    """Whether torch's, gloo's or NCCL's communication failed, here or in what `error` was raised from."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl")):
            return True
        error = error.__cause__ or error.__context__
    return False


def until(ready: Callable[[], bool], limit_s: float = math.inf) -> bool:
    """Asks ever less often, up to once a second, until `ready`; or False. (A store's own wait prints when it ends.)"""
    began = time.monotonic()
    while not ready():
        if (waited := time.monotonic() - began) > limit_s:
            return False
        time.sleep(min(1, 0.02 + waited / 10))
    return True
