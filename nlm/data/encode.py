"""Work on text in other processes, in the order of the text."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from nlm.data.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2
"""Results a worker that wait to be taken: enough that none is idle, little to hold in memory."""


def encode_in_order(
    encode: Callable[[Tokenizer, T], R], items: Iterable[T], tokenizer: str, workers: int
) -> Iterator[tuple[T, R]]:
    """Each item and what `encode`, a function of a module, makes of it, in order. `workers` = 0 does it here.

    Errors: ValueError for a bad tokenizer; whatever `encode` raises.
    """
    if not workers:
        coder = load_tokenizer(tokenizer)
        yield from ((item, encode(coder, item)) for item in items)
        return
    # Never by fork, which copies the locks of a process that has threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _load, (tokenizer,))
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_call, encode, item)))
            if len(waiting) > AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_coder: Tokenizer


def _load(tokenizer: str) -> None:
    global _coder
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # its parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of threads in each process; the processes are enough
    _coder = load_tokenizer(tokenizer)


def _call(encode: Callable[[Tokenizer, Any], R], item: Any) -> R:
    return encode(_coder, item)
