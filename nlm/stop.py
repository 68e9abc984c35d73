"""Stopping before the end, on request: a signal or the time limit, agreed on by all ranks at the end of a step."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from nlm.mesh import Mesh
from nlm.parallel.watch import of_a_collective

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers send before they take the machine away, and Ctrl-C."""

REQUEUE = 75
"""The exit code then: EX_TEMPFAIL of sysexits.h, "the user is invited to retry"."""

OUT_OF_TIME = 1000


class Stopped(Exception):
    """A run ended early because it was asked to, its checkpoint written. `told`: whether another rank says so."""

    def __init__(self, text: str, told: bool) -> None:
        super().__init__(text)
        self.told = told


class StopRequest:
    """Takes the signals while it is entered. A second Ctrl-C ends a run of one process at once.

    Signals reach the main thread only: in another one there is just the time limit.
    """

    def __init__(self, mesh: Mesh, max_minutes: float | None) -> None:
        self._group = dist.new_group(backend="gloo") if mesh.device_mesh is not None else None
        self._ends = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._max_minutes = max_minutes
        self._asked = 0
        self._agreeing: tuple[dist.Work, Tensor] | None = None

    def agreed(self) -> str | None:
        """Called by all ranks after every step -> why to stop after this one, the same on all, or None.

        One rank alone stops at once; of several each says what it knows, and hears a step later what the others know.
        """
        out_of_time = self._ends is not None and time.monotonic() > self._ends
        mine = OUT_OF_TIME if out_of_time and not self._asked else self._asked
        if self._group is None:
            return self._reason(mine)
        heard = 0
        if self._agreeing is not None:
            work, answer = self._agreeing
            work.wait()
            heard = int(answer)
        told = torch.tensor(mine)
        work = dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True)
        self._agreeing = work, told
        return self._reason(heard)

    def _reason(self, asked: int) -> str | None:
        if not asked:
            return None
        return f"{self._max_minutes:g} minutes are up" if asked == OUT_OF_TIME else signal.Signals(asked).name

    def _take(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT == self._asked and self._group is None:
            raise KeyboardInterrupt
        self._asked = number

    def __enter__(self) -> Self:
        here = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS if here}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self._agreeing is not None:
            self._agreeing[0].wait()
        if self._asked and of_a_collective(error):
            signal.raise_signal(self._asked)  # a launcher ends the ranks that are left: there is nothing to wait for
