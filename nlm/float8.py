"""Products in float8: those of the blocks' matrices, in forward and backward, by torchao's float8 training.

Both factors of a product are rounded to float8 e4m3, each row along the dim that is summed over after a scale that
brings its largest element near the format's end; the product sums in float32, in the forward with the GPU's fast
accumulation, which keeps fewer bits, as torchao's recipe has it, and gives bfloat16. Scales are powers of two. So they
do not change to what an element is rounded, unless that is less than 2^-13 of the largest of its row, where float8 has
no more normal numbers, and it matters little that ranks and microbatches, which have parts of the rows, scale them
otherwise. But numbers do depend on the layout more than in bfloat16: of elements that differ by a rounding of bfloat16
there, some are rounded to neighbours in float8, 16 times as far apart. After five steps of a small model losses are
1e-3 apart where in bfloat16 they are 1e-4, and float8's from bfloat16's 4e-3.

Weights, and what the optimizer sees of gradients, stay float32. Embedding, head and scores are as under "bf16".
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from nlm.anatomy import READS, WRITES
from nlm.model import Linear

LEAST_CAPABILITY = (8, 9)
"""CUDA's, of the first GPUs with float8 products: Ada, Hopper, Blackwell."""


def refuse_missing_float8(precision: str, device: torch.device, say: Callable[[str], None] | None = None) -> None:
    """On a CPU, `say` hears that products are emulated.

    Errors: ValueError where "fp8" is asked for and cannot be had.
    """
    if precision != "fp8":
        return
    if find_spec("torchao") is None:
        raise ValueError("train.precision: 'fp8' needs torchao: pip install 'nlm[float8]'; or set 'bf16'")
    if device.type == "cpu":
        if say:
            say("train.precision = 'fp8' on a CPU: products of numbers rounded to float8, emulated, slower than 'bf16'")
    elif (has := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise ValueError(
            f"train.precision: 'fp8' needs a GPU of CUDA capability {'.'.join(map(str, LEAST_CAPABILITY))}, got "
            f"{torch.cuda.get_device_name(device)}, {'.'.join(map(str, has))}; set 'bf16'"
        )


def multiply_in_float8(model: nn.Module, emulate: bool) -> None:
    """Takes over the products of the blocks' matrices, in place; `emulate`: rounds as float8 does, multiplies in
    float32."""
    from torchao.float8 import Float8LinearConfig, LinearMMConfig, ScaledMMConfig  # an optional extra

    recipe = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)
    products = (recipe.gemm_config_output, recipe.gemm_config_grad_input, recipe.gemm_config_grad_weight)
    kernels = LinearMMConfig(*(ScaledMMConfig(emulate, product.use_fast_accum) for product in products))
    for module in model.modules():
        if isinstance(module, Linear) and module.roles["weight"] in READS | WRITES:
            module.multiply = partial(_multiply, kernels=kernels, recipe=recipe)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Any, recipe: Any) -> Tensor:
    """[… in], [out in], [out] -> [… out] in bfloat16."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    y: Tensor = matmul_with_hp_or_float8_args.apply(x.to(torch.bfloat16), weight.t(), kernels, recipe)
    return y if bias is None else y + bias.to(y.dtype)
