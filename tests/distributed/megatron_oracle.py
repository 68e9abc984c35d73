"""megatron-core's tensor-parallel layers on CPU under gloo: an independent oracle of nlm's. Tests only.

Weights come whole [out, in], under nlm's names; each rank takes its part. The stream is [B S/n D], n the ranks that
divide the sequence. Megatron's layout is [S B D]: `Megatron` turns it at every call.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.utils import GlobalMemoryBuffer
from torch import Tensor, nn


@contextmanager
def on_cpu(group: dist.ProcessGroup) -> Iterator[None]:
    """Forward, backward and construction must all run inside. Nothing of it is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        # What the layers read from module globals even when they are given `tp_group`.
        patch.setattr(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", group)
        patch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
        # As theirs, but without the cast to float32, which would round a float64 loss.
        patch.setattr(VocabParallelCrossEntropy, "calculate_logits_max", staticmethod(lambda x: (x, x.amax(-1))))
        yield


class Megatron:
    """What of a model `weights` names, in megatron's layers."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        group: dist.ProcessGroup,
        head_dim: int,
        sequence: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        self.weights, self.group, self.head_dim, self.activation = weights, group, head_dim, activation
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=group.size(),
            sequence_parallel=sequence,
            params_dtype=next(iter(weights.values())).dtype,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        self.layers: dict[str, Any] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name in weights:
            if name.endswith(".weight"):
                self._add(name.removesuffix(".weight"))

    def _add(self, name: str) -> None:
        whole = {
            part: self.weights[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in self.weights
        }
        n_out, n_in = whole["weight"].shape[0], whole["weight"].shape[-1]
        given: dict[str, Any] = {"config": self.config, "init_method": None, "tp_group": self.group}
        linear = {"bias": "bias" in whole, "skip_bias_add": False} | given
        match name.rpartition(".")[2]:
            case "embed":
                scatter = self.config.sequence_parallel
                layer = VocabParallelEmbedding(n_out, n_in, reduce_scatter_embeddings=scatter, **given)
                dims = {"weight": 0}
            case "wo" | "w_down":
                layer, dims = RowParallelLinear(n_in, n_out, input_is_parallel=True, **linear), {"weight": 1}
            case "wq" | "wk" | "wv" | "w_gate" | "w_up" | "head":
                layer, dims = ColumnParallelLinear(n_in, n_out, **linear), {"weight": 0, "bias": 0}
            case _:  # a norm, as megatron's own on CPU: torch's
                layer, dims = nn.LayerNorm(n_out, bias="bias" in whole, dtype=self.config.params_dtype), {}
                for parameter in layer.parameters():
                    parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        for part, parameter in layer.named_parameters():
            full = whole[part]
            mine = full.chunk(self.group.size(), dims[part])[self.group.rank()] if part in dims else full
            parameter.data.copy_(mine)
            self.parameters[f"{name}.{part}"] = parameter
        self.layers[name] = layer

    def embed(self, tokens: Tensor) -> Tensor:
        """[B S] -> [B S/n D]."""
        x = self.layers["embed"](tokens)
        return x.transpose(0, 1) if self.config.sequence_parallel else x

    def norm(self, name: str, x: Tensor) -> Tensor:
        """[B S/n D] -> [B S/n D]; without such a norm, x."""
        return self.layers[name](x) if name in self.layers else x

    def ffn(self, name: str, x: Tensor) -> Tensor:
        """[B S/n D] -> [B S/n D], `name` such as blocks.0.ffn."""
        x = x.transpose(0, 1).contiguous()
        hidden = self._linear(f"{name}.w_up", x)  # [S B F/n]
        if f"{name}.w_gate" in self.layers:
            hidden = self.activation(self._linear(f"{name}.w_gate", x)) * hidden
        else:
            hidden = self.activation(hidden)
        return self._linear(f"{name}.w_down", hidden).transpose(0, 1)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """[B S/n D] -> [B S/n D], causal, without positions; `name` such as blocks.0.attn."""
        x = x.transpose(0, 1).contiguous()
        q, k, v = (
            self._linear(f"{name}.{w}", x).unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3)  # [B H/n S Dh]
            for w in ("wq", "wk", "wv")
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self._linear(f"{name}.wo", out.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)

    def logits(self, x: Tensor) -> Tensor:
        """[B S/n D] -> [B S V/n]."""
        return self._linear("head", x.transpose(0, 1).contiguous()).transpose(0, 1)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[B S V/n], [B S] -> [B S]. Theirs turns the logits it is given into probabilities, hence the copy."""
        losses = vocab_parallel_cross_entropy(
            logits.transpose(0, 1).clone(memory_format=torch.contiguous_format), targets.t().contiguous()
        )
        return losses.t()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of each; of what sees a part of the sequence, the sum (as their finalize_model_grads)."""
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients[name] = parameter.grad
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=self.group)
        return gradients

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self.layers[name](x)[0]  # and a bias, None but for skip_bias_add


def mega_block(
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    head_dim: int,
    sequence: bool = False,
    activation: Callable[[Tensor], Tensor] = F.gelu,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """tokens, targets [B S] -> logits [B S V/n], loss [] summed over targets, this rank's part of each gradient.

    As many pre-norm blocks as `weights` has: x + attention(norm x), x + ffn(norm x).
    """
    with on_cpu(group):
        theirs = Megatron(weights, group, head_dim, sequence, activation)
        x = theirs.embed(tokens)
        layer = 0
        while f"blocks.{layer}.attn.wq" in theirs.layers:
            block = f"blocks.{layer}"
            x = x + theirs.attention(f"{block}.attn", theirs.norm(f"{block}.attn_residual.norm", x))
            x = x + theirs.ffn(f"{block}.ffn", theirs.norm(f"{block}.ffn_residual.norm", x))
            layer += 1
        logits = theirs.logits(theirs.norm("final", x))
        loss = theirs.cross_entropy(logits, targets).sum()
        loss.backward()
        return logits.detach(), loss.detach(), theirs.gradients()
