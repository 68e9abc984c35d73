"""Text to tokens in worker processes, in the order of the text."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from nlm.data.tokenizer import Ids, Tokenizer, load_tokenizer

K = TypeVar("K")
AHEAD = 2
"""Batches a worker that wait to be taken: enough that none is idle, little to hold in memory."""


def encode_in_order(
    batches: Iterable[tuple[K, list[str]]], tokenizer: str, workers: int
) -> Iterator[tuple[K, list[Ids]]]:
    """Texts, with whatever stands beside them -> the same with the texts encoded, in the same order.

    `workers` = 0 encodes here. Errors: ValueError for a bad tokenizer.
    """
    coder = load_tokenizer(tokenizer)
    if not workers:
        yield from ((key, coder.encode(texts)) for key, texts in batches)
        return
    # Never by fork, which copies the locks of a process that has threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _load, (tokenizer,))
    waiting: deque[tuple[K, Future[list[Ids]]]] = deque()
    try:
        for key, texts in batches:
            waiting.append((key, pool.submit(_encode, texts)))
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
    _coder = load_tokenizer(tokenizer)


def _encode(texts: list[str]) -> list[Ids]:
    return _coder.encode(texts)
