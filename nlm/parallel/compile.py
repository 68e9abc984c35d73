"""Compiling block by block: one graph serves every layer, so compile time does not grow with depth."""

from collections.abc import Callable

import torch
from torch._functorch import config as autograd_config

from nlm.model import Transformer


def compile_model(model: Transformer, backend: str | Callable[..., object] = "inductor") -> None:
    """Blocks and loss, in place. Errors: whatever keeps one from being one whole graph, at its first call.

    What is compiled is `forward` alone, without the hooks by which FSDP2 and ZeRO-3 gather a block around it.
    """
    # What the backward needs is kept as the tensor that is kept anyway, not as a view and beside it a mask of the same,
    # which took longer than the matrix product before it on a processor without AVX-512.
    autograd_config.recompute_views = True
    for module in (*model.blocks.values(), model.cross_entropy):
        module.forward = torch.compile(  # type: ignore[method-assign]
            module.forward, fullgraph=True, dynamic=False, backend=backend
        )
