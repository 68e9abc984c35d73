"""Puts the Triton kernels into a block's graph where it has what they compute: no scheme and no layer knows of them.

What is looked for are the sums and norms that are there, not schemes: a residual sum beside norms, nGPT's step, rotary
positions beside norms of heads.
"""

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from nlm.kernels.check import REFERENCES, Like, check

KERNELS = torch.ops.nlm


def fuse(graph: Graph) -> Counter[str]:
    """In place -> how often each kernel was put in. Errors: RuntimeError where one computes something else."""
    for rule in (_sphere_step, _unit_again, _rotary, _residual):
        for node in list(graph.nodes):
            if not node._erased:
                rule(graph, node)
        graph.eliminate_dead_code()
    graph.lint()
    put = [node for node in graph.nodes if _is(node, *REFERENCES)]
    for node in put:
        check(node.target, next(_value(a).device for a in node.args if isinstance(a, Node)), *map(_like, node.args))
    return Counter(node.target._opname for node in put)


def _like(argument: Any) -> Any:
    value = _value(argument)
    if not isinstance(value, Tensor):
        return argument
    # Where sizes are not fixed, those of the batch it is compiled with.
    shape = tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape)
    return Like(shape, value.dtype, value.requires_grad)


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def _shape(node: Any) -> tuple[int, ...]:
    """Empty of what is no tensor, too."""
    value = _value(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is(node: Any, *targets: Any) -> bool:
    """Whether a node is a call of one of them; methods by name."""
    return isinstance(node, Node) and node.op in {"call_function", "call_method"} and node.target in targets


def _argument(node: Any, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _norm(node: Any) -> tuple[str, Any, Any, Any, float] | None:
    """A norm over the last axis -> its kind, what it reads, gain, bias, eps."""
    if not _is(node, torch.rms_norm, F.rms_norm, torch.layer_norm, F.layer_norm) or len(node.args[1]) != 1:
        return None
    x, _, gain = (*node.args, None)[:3]
    if _is(node, torch.rms_norm, F.rms_norm):
        eps = _argument(node, 3, "eps")
        return None if eps is None else ("rms", x, gain, None, eps)
    return "layer", x, gain, _argument(node, 3, "bias"), _argument(node, 4, "eps", 1e-5)


def _unit(node: Any) -> tuple[Any, float] | None:
    """A division by the length over the last axis -> what it reads, the least length."""
    if not _is(node, F.normalize) or node.kwargs.get("dim") != -1:
        return None
    return node.args[0], node.kwargs["eps"]


def _replace(graph: Graph, node: Any, kernel: Any, *arguments: Any) -> None:
    """By a call of the kernel."""
    with graph.inserting_before(node):
        call = graph.call_function(kernel, arguments)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def _residual(graph: Graph, node: Any) -> None:
    """x + f or α x + f, where a norm makes f or reads the sum, or both."""
    shape = _shape(node)
    if not _is(node, operator.add, operator.iadd) or len(shape) != 3 or any(_shape(a) != shape for a in node.args):
        return
    x, f = node.args
    if _norm(x) and not _norm(f):
        x, f = f, x
    alpha = None
    if _is(x, operator.mul) and any(map(_is_constant, x.args)):
        alpha, x = sorted(x.args, key=_is_constant, reverse=True)
    after = [user for user in node.users if (norm := _norm(user)) and norm[1] is node]
    normed = after[0] if len(after) == 1 else None
    second, first = _norm(normed), _norm(f) if len(f.users) == 1 else None
    if first and second and first[4] != second[4]:
        first = None
    if not (first or second):
        return
    kind_1, f, gain_1, bias_1, eps = first or ("none", f, None, None, 0.0)
    kind_2, _, gain_2, bias_2, eps = second or ("none", None, None, None, eps)
    dtype = torch.promote_types(_value(x).dtype, _value(f).dtype)
    if any(_value(n).dtype != dtype for n in (node, normed) if n is not None):
        return
    arguments = x, f, alpha, gain_1, bias_1, gain_2, bias_2, kind_1, kind_2, eps
    with graph.inserting_before(node):
        call = graph.call_function(KERNELS.residual.default, arguments)
    if normed is not None:
        _replace(graph, normed, operator.getitem, call, 1)
    _replace(graph, node, operator.getitem, call, 0)


def _is_constant(node: Any) -> bool:
    """A number of the layer's that is not learned."""
    value = _value(node)
    return isinstance(value, Tensor) and node.op == "placeholder" and value.ndim == 0 and not value.requires_grad


def _sphere_step(graph: Graph, node: Any) -> None:
    """unit(h + a (unit(f) - h))."""
    if not (outer := _unit(node)) or not _is(outer[0], operator.add) or not _is(outer[0].args[1], operator.mul):
        return
    h, (a, difference) = outer[0].args[0], outer[0].args[1].args
    if not _is(difference, operator.sub) or difference.args[1] is not h or not (inner := _unit(difference.args[0])):
        return
    if inner[1] == outer[1] and _shape(a) == _shape(h)[-1:] and _value(node).dtype == _value(h).dtype:
        _replace(graph, node, KERNELS.sphere_step.default, h, inner[0], a, outer[1])


def _unit_again(graph: Graph, node: Any) -> None:
    """What has length 1 need not be divided by its length."""
    if (outer := _unit(node)) and _is(outer[0], KERNELS.sphere_step.default):
        node.replace_all_uses_with(outer[0])


def _rotary(graph: Graph, node: Any) -> None:
    """Rotary positions, an RMSNorm of each head before them, unit length and a scale after them."""
    if not _is(node, torch.addcmul) or not _is(node.args[0], operator.mul):
        return
    x, cos = node.args[0].args
    _, swapped, sin = node.args
    swaps, steps = [swapped], 3 if _is(swapped, "flatten") else 1
    while len(swaps) < steps:
        swaps.append(swaps[-1].args[0])
    if [n.target for n in swaps] not in (["roll"], ["flatten", "flip", "unflatten"]) or swaps[-1].args[0] is not x:
        return
    if not (_is(cos, "to") and _is(sin, "to")) or len(_shape(x)) != 4:
        return
    last, gain, scale, eps, least = node, None, None, None, None
    if (before := _norm(x)) and before[0] == "rms" and set(x.users) == {node.args[0], swaps[-1]}:
        _, x, gain, _, eps = before
    if after := _unit(_only_user(last)):
        last, least = _only_user(last), after[1]
    if _is(user := _only_user(last), operator.mul) and _shape(user.args[1]) == _shape(x)[-2:]:
        last, scale = user, user.args[1]
    tables = cos.args[0], sin.args[0]
    _replace(graph, last, KERNELS.rotary.default, x, *tables, gain, scale, eps, least, steps == 3, _value(last).dtype)


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None
