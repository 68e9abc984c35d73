"""What kernels take: memory, moment by moment, and work."""

import weakref
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FLOPS: dict[Any, Any] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: _attention_backward(
        g, q, k, v
    ),
}
"""The arithmetic of products, by kernel, as torch's FlopCounterMode has it. It leaves out the CPU's attention, which
counts as the GPU's does: in full, causal or not, and in the backward with the scores that are computed again."""


class Ledger(TorchDispatchMode):
    """Bytes of all storages that were made inside and are still there: `now`, and the `peak` since it was last read.

    Beside, all so far: `flops` of products, and `slow_flops`, of them those that are not in float8 though others are;
    `moved`, the bytes that other kernels read and wrote; `kernels`, of any kind; `sent`, the bytes that this rank sends
    in collectives over `ranks`, as a ring does. What a kernel takes and gives back within one call is not seen.
    """

    def __init__(self, ranks: int = 1, float8: bool = False) -> None:
        super().__init__()
        self.float8 = float8
        self.now = self.peak = self.flops = self.slow_flops = self.moved = self.kernels = 0
        self.sent = 0.0
        others = (ranks - 1) / ranks
        self._sends = {
            "all_reduce": 2 * others,
            "all_gather_into_tensor": ranks * others,
            "reduce_scatter_tensor": others,
        }
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "prim":  # a question, such as for the device
            return result
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in made:
            if not is_traceable_wrapper_subclass(tensor):  # torchao's of float8, whose own tensors have been seen
                self._see(tensor.untyped_storage())
        if function.namespace == "_c10d_functional":
            self.sent += self._sends.get(function._opname, 0) * _bytes(args[:1])
        elif not _is_view(function):
            self.kernels += 1
            if function.overloadpacket in FLOPS:
                flops = FLOPS[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
                self.flops += flops
                self.slow_flops += flops if self.float8 and not is_traceable_wrapper_subclass(args[0]) else 0
            else:
                self.moved += _bytes((args, made))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def read_peak(self) -> int:
        """The peak, which begins anew with what is there now."""
        peak, self.peak = self.peak, self.now
        return peak


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


@cache
def _is_view(function: Any) -> bool:
    """Whether it only looks at the memory of another tensor in another way."""
    aliases = [value.alias_info for value in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _attention(*tensors: torch.Tensor) -> int:
    return sdpa_flop_count(*(t.shape for t in tensors))


def _attention_backward(*tensors: torch.Tensor) -> int:
    return sdpa_backward_flop_count(*(t.shape for t in tensors))
