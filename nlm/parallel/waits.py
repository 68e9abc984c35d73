"""How long a rank waits for the others: in the collectives of a step, on the device that does the work.

In synchronous training all ranks take the same time for a step: who is done early waits in a collective until the last
one comes. So it is this time that differs, and a step less it, the rank's own time, is what tells a slow rank.

Python waits for torch's collectives in the calls of `CALLS`, which are replaced while a `Waits` is entered (FSDP2,
pipelines, DeepSpeed, the mesh's own sums), and in nlm.parallel.tensor. DDP waits in C++, at the end of the backward:
for it counts what comes after the last gradient; and once in the second step, where it puts its buckets in order.
Compiled graphs wait for tensor parallel ranks by themselves, and are not seen: there the own time has it.

On a CPU, gloo makes the host wait, and its clock is read. On a GPU, NCCL makes a stream wait, and CUDA events are
recorded there before and after; nobody waits for them. For FSDP2 that is the stream that gathers, beside the one that
computes: the own time is then less than the true one, on all ranks alike. In both cases a collective's transfer is part
of the wait, likewise on all ranks alike.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Reducer  # torch.distributed has it, unknown to mypy
from torch.autograd import Variable

SYNCHRONOUS = (
    "all_reduce",
    "broadcast",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "all_to_all_single",
)
CALLS: list[tuple[Any, str]] = [(dist.Work, "wait"), (Reducer, "_rebuild_buckets")]
CALLS += [(dist, name) for name in SYNCHRONOUS if hasattr(dist, name)]
"""Where a collective is waited for. NCCL puts a synchronous one on the stream at hand and gives no `Work`; gloo gives
one, for which torch waits within the call."""

Moment = float | torch.cuda.Event
"""In the host's time, in seconds, or in that of a GPU's stream."""


def seconds(begin: Moment, end: Moment) -> float:
    """From a moment to another, which is over."""
    if isinstance(begin, float) or isinstance(end, float):
        return end - begin  # type: ignore[operator]
    return begin.elapsed_time(end) / 1e3


def is_over(moment: Moment) -> bool:
    return isinstance(moment, float) or moment.query()


class Waits:
    """Context manager. `spans` is what it has seen, of a step that was begun and did not end yet."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[Moment, Moment]] | None = None
        self.computed: Moment | None = None
        self._inside = False

    def now(self) -> Moment:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self) -> Iterator[None]:
        if self.spans is None or self._inside or not _computes():
            yield
            return
        begin, spans, self._inside = self.now(), self.spans, True
        try:
            yield
        finally:
            self._inside = False
        spans.append((begin, self.now()))

    def __enter__(self) -> Self:
        global current
        current, self._replaced = self, [(owner, name, getattr(owner, name)) for owner, name in CALLS]
        for owner, name, call in self._replaced:
            setattr(owner, name, _timed(self, call))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global current
        current = None
        for replaced in self._replaced:
            setattr(*replaced)


current: Waits | None = None
"""The one that is entered."""


def waiting() -> AbstractContextManager[None]:
    """Around a wait that is none of `CALLS`."""
    return nullcontext() if current is None else current.span()


def backward_begins(_: Tensor) -> None:
    """A hook of a loss whose backward ends in DDP's wait, before which its last gradient is computed."""
    Variable._execution_engine.queue_callback(_computed)  # DDP puts its own in the same queue later


def _computed() -> None:
    if current is not None and current.spans is not None:
        current.computed = current.now()


def backward_ended() -> None:
    if current is not None and current.spans is not None and current.computed is not None:
        current.spans.append((current.computed, current.now()))
        current.computed = None


def _timed(waits: Waits, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def timed(*arguments: Any, **options: Any) -> Any:
        with waits.span():
            return call(*arguments, **options)

    return timed


def _computes() -> bool:
    """Whether this is the main thread or one of autograd's, and not, say, the one that writes a checkpoint."""
    thread = threading.current_thread()
    return thread is threading.main_thread() or isinstance(thread, threading._DummyThread)
