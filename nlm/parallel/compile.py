"""Compiling block by block: one graph serves every layer, so compile time does not grow with depth."""

from collections.abc import Callable

from nlm.model import Transformer


def compile_blocks(model: Transformer, backend: str | Callable[..., object] = "inductor") -> None:
    """In place. Errors: whatever keeps a block from being one whole graph, at its first call."""
    for block in model.blocks.values():
        block.compile(fullgraph=True, dynamic=False, backend=backend)
