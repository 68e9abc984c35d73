"""Compiling block by block: one graph serves every layer, so compile time does not grow with depth."""

from collections.abc import Callable

import torch

from nlm.model import Transformer


def compile_model(model: Transformer, backend: str | Callable[..., object] = "inductor") -> None:
    """Blocks and loss, in place. Errors: whatever keeps one from being one whole graph, at its first call.

    What is compiled is `forward` alone, without the hooks by which FSDP2 and ZeRO-3 gather a block around it.
    """
    for module in (*model.blocks.values(), model.cross_entropy):
        module.forward = torch.compile(  # type: ignore[method-assign]
            module.forward, fullgraph=True, dynamic=False, backend=backend
        )
