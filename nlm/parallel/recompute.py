"""Trading time for memory: the forward keeps the stream in some places only, and the backward computes again from there
what it needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from math import ceil, log2, sqrt

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nlm.model import Run, Stack, Transformer

PRODUCTS = [
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
]
"""What "selective" does not compute again, and beside it no collective."""
COLLECTIVES = [
    getattr(torch.ops._c10d_functional, name).default
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "wait_tensor")
]


def recompute(model: Transformer, mode: str) -> None:
    """In place, as `mode`, a value of parallel.recompute but "auto", has it."""
    assert mode != "auto", "nlm.plan.choose settles on one before a model is prepared"
    for stack in model.stacks:
        _recompute(stack, mode)


def _recompute(stack: Stack, mode: str) -> None:
    match mode:
        case "block":
            stack.through = partial(_segments, stack, length=1)
        case "offload":
            stack.through = partial(_offloaded, stack)
        case "selective":
            for block in stack.blocks.values():
                block.forward = partial(  # type: ignore[method-assign]
                    checkpoint,
                    block.forward,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=partial(create_selective_checkpoint_contexts, PRODUCTS + COLLECTIVES),
                )
        case "sqrt":
            stack.through = partial(_segments, stack, length=segment_length(len(stack.blocks)))
        case "nested":
            stack.through = partial(_halves, stack)


def segment_length(n_blocks: int) -> int:
    """Of how many blocks "sqrt" keeps one input: about as many as there are segments then (Chen et al. 2016,
    arXiv:1604.06174)."""
    return max(1, ceil(sqrt(n_blocks)))  # a stage of a pipeline may have none of a stack's


def inputs_kept(mode: str, n_blocks: int) -> tuple[int, int]:
    """Of how many blocks a forward keeps the inputs, where it computes blocks again, and at most the backward too."""
    match mode:
        case "sqrt":
            return ceil(n_blocks / segment_length(n_blocks)) if n_blocks else 0, 0
        case "offload":
            return 0, min(1, n_blocks)
        case "nested":
            return min(2, n_blocks), max(0, ceil(log2(max(1, n_blocks))) - 1)
    return n_blocks, 0


def times_again(mode: str, n_blocks: int) -> float:
    """How often a block is computed again in a backward through so many, on the average."""
    if mode != "nested":
        return 0.0 if mode == "none" else 1.0
    if n_blocks < 2:
        return 0.0
    return (_in_halves(ceil(n_blocks / 2)) + _in_halves(n_blocks // 2)) / n_blocks


@cache
def _in_halves(n_blocks: int) -> int:
    """Blocks computed in the backward of a half: up to the middle, for the second half of it; then in both of them."""
    first, second = ceil(n_blocks / 2), n_blocks // 2
    return n_blocks if n_blocks < 2 else first + _in_halves(second) + _in_halves(first)


def _segments(stack: Stack, run: Run, places: range, x: Tensor, length: int) -> Tensor:
    for start in range(0, len(places), length):
        x = _again(stack, run, places[start : start + length], x)
    return x


def _offloaded(stack: Stack, run: Run, places: range, x: Tensor) -> Tensor:
    """As block by block; the blocks' inputs wait for the backward in the host's memory."""
    with save_on_cpu(pin_memory=x.device.type == "cuda"):
        return _segments(stack, run, places, x, length=1)


def _halves(stack: Stack, run: Run, places: range, x: Tensor) -> Tensor:
    """Each half likewise, down to blocks: on the way to one, an input a level is kept."""
    if len(places) < 2:
        return run(places, x)
    middle = ceil(len(places) / 2)
    for half in (places[:middle], places[middle:]):
        x = _again(stack, partial(_halves, stack, run), half, x)
    return x


def _again(stack: Stack, run: Callable[[range, Tensor], Tensor], places: range, x: Tensor) -> Tensor:
    """The stream after these places; what is in between is not kept. No layer draws random numbers of torch's."""
    return checkpoint(  # type: ignore[no-any-return]
        run,
        places,
        x,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _recomputing(stack)),
    )


@contextmanager
def _recomputing(stack: Stack) -> Iterator[None]:
    before, stack.recomputing = stack.recomputing, True
    try:
        yield
    finally:
        stack.recomputing = before
