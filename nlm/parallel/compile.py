"""Compiling block by block: one graph serves every layer, so compile time does not grow with depth."""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import lookup_backend
from torch._functorch import config as autograd_config
from torch.fx import GraphModule
from torch.fx.experimental import _config as shape_config

from nlm.config import ParallelConfig
from nlm.model import Transformer

Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]
GRAPHS = 16
"""The most that torch may make of all blocks, where they are of any shape."""


def compile_model(
    model: Transformer,
    backend: str | Backend = "inductor",
    kernels: str = "inductor",
    say: Callable[[str], None] | None = None,
    dynamic: bool = False,
) -> None:
    """Blocks and loss, in place; with `kernels`, a value of parallel.kernels, of which `say` hears where they went.
    `dynamic`: one graph is for batches of all shapes, and not one for each.

    Errors: whatever keeps one from being one whole graph, or a kernel that is wrong, at its first call.

    What is compiled is `forward` alone, without the hooks by which FSDP2 and ZeRO-3 gather a block around it.
    """
    # What the backward needs is kept as the tensor that is kept anyway, not as a view and beside it a mask of the same,
    # which took longer than the matrix product before it on a processor without AVX-512.
    autograd_config.recompute_views = True
    if dynamic:
        # Sizes alone are open, not a norm's eps too; and those equal in the first batch are not taken for the same.
        dynamo_config.specialize_float, shape_config.use_duck_shape = True, False
        # Two kinds of block, each in training, recorded and in validation, of several rows and of one.
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, GRAPHS)
    if kernels == "triton":
        backend = partial(_with_triton, lookup_backend(backend) if isinstance(backend, str) else backend, say)
    for module in (*model.layers.values(), model.cross_entropy):
        module.forward = torch.compile(  # type: ignore[method-assign]
            module.forward, fullgraph=True, dynamic=dynamic, backend=backend
        )


def _with_triton(
    backend: Backend, say: Callable[[str], None] | None, graph: GraphModule, inputs: list[Tensor]
) -> Callable[..., Any]:
    from nlm.kernels.fuse import fuse  # Triton is imported only where it is chosen: not every machine has it

    put = fuse(graph.graph)
    graph.recompile()
    if say and put:
        say("kernels in a block: " + ", ".join(f"{n} x {name}" for name, n in sorted(put.items())))
    return backend(graph, inputs)


def refuse_missing_kernels(parallel: ParallelConfig, device: torch.device) -> None:
    """Errors: ValueError where the config asks for kernels that cannot run here."""
    if parallel.kernels != "triton":
        return
    if find_spec("triton") is None:
        raise ValueError("parallel.kernels: 'triton' needs Triton: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"parallel.kernels: 'triton' needs a GPU, got {device.type}; set 'inductor', or, to try it slowly, "
            "TRITON_INTERPRET=1"
        )
