"""Compiling block by block: one graph serves every layer, so compile time does not grow with depth."""

from collections.abc import Callable

from nlm.model import Transformer


def compile_model(model: Transformer, backend: str | Callable[..., object] = "inductor") -> None:
    """Blocks and loss, in place. Errors: whatever keeps one from being one whole graph, at its first call."""
    for module in (*model.blocks.values(), model.cross_entropy):
        module.compile(fullgraph=True, dynamic=False, backend=backend)
