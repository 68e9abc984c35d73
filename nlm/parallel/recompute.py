"""Trading time for memory: keep a block's input only, and compute the block again in the backward."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from nlm.model import Transformer


def recompute(model: Transformer, mode: str) -> None:
    """In place, as `mode`, a value of parallel.recompute, has it."""
    if mode == "block":
        recompute_blocks(model)


def recompute_blocks(model: Transformer) -> None:
    model.call_block = partial(checkpoint, use_reentrant=False)
