"""The process and its machine: device, precision, memory."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def pick_device() -> torch.device:
    """The GPU of this rank's number on its host (LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a forward runs: bf16 matrix products over fp32 weights, but for those that nlm.float8 takes
    over under "fp8", or the weights' own precision."""
    if precision in ("bf16", "fp8"):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> None:
    """Lets the C library keep what one step frees for the next, where it is glibc.

    By default a tensor of 32 MiB or more, such as the logits, comes from the kernel page by page at every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # names of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Python's cyclic garbage is collected where the code inside calls `gc.collect`, and nowhere else.

    By itself the collector looks through a thousand layers for half a second, every few steps, each rank's when it
    likes while the others wait, in whatever thread has just allocated something. Here it knows of all that was there
    at the start that it stays, and the rest takes it a millisecond.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """On the CPU, numbers below float32's 1e-38 are 0 inside: of vanishing gradients, some processors compute with
    them ten times as slowly."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
