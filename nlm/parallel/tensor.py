"""Tensor parallelism on plain local tensors: the collectives where the stream meets a sublayer.

Every rank of the group holds a part of the heads, of the hidden units and of the vocabulary. What reads the stream
`enter`s it and computes with its own part; what writes the stream holds a partial sum, which `leave` completes
(Shoeybi et al. 2019, arXiv:1909.08053, section 3). Under sequence parallelism the stream between them is divided
along the sequence (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from nlm.anatomy import CUT_AXES, IGNORED, Axis, Span
from nlm.parallel.waits import waiting

Group = str
"""A process group's name: unlike the group itself, a constant that a compiled graph can hold."""


class Ranks:
    """The ranks of a group, and which of them this one is; without a group, it is alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.group = "" if group is None else group.group_name

    def sum(self, x: Tensor) -> Tensor:
        """[…] -> […]: the sum over the ranks, which each of them goes on to use in its own way."""
        return x if self.size == 1 else _Sum.apply(x, self.group)

    def stack(self, x: Tensor) -> Tensor:
        """[…] -> [n …]: what all ranks have, which each of them goes on to use in its own way."""
        if self.size == 1:
            return x[None]
        rows = (0, 0) * x.dim() + (self.rank, self.size - 1 - self.rank)
        return self.sum(F.pad(x[None], rows))


class TensorParallel(Ranks):
    """One rank's share in the tensor parallel group; without a group, all of everything."""

    def __init__(self, group: dist.ProcessGroup | None = None, sequence: bool = False) -> None:
        super().__init__(group)
        self.sequence = sequence and self.size > 1

    def span(self, axis: Axis, full: int) -> Span:
        return Span.part(full, self.rank, self.size) if axis in CUT_AXES else Span.whole(full)

    def positions(self, seq_len: int) -> Span:
        """Which positions of the sequence this rank's part of the stream has."""
        return Span.part(seq_len, self.rank, self.size) if self.sequence else Span.whole(seq_len)

    def enter(self, x: Tensor) -> Tensor:
        """The stream [B S/n D] -> [B S D], to be read by matrices that are cut along their outputs."""
        if self.size == 1:
            return x
        return _Gather.apply(x, self.group, self.size) if self.sequence else _Enter.apply(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums [B S D] -> the stream [B S/n D]."""
        if self.size == 1:
            return x
        return _Scatter.apply(x, self.group, self.size) if self.sequence else _Leave.apply(x, self.group)

    def cross_entropy(self, logits: Tensor, targets: Tensor, vocab: Span, smoothing: float = 0.0) -> Tensor:
        """Logits [N V/n] of the tokens in `vocab`, targets [N] -> []: -ln softmax(logits)[target], summed over N.

        Targets that are IGNORED count nothing. With `smoothing`, that share of each target is spread evenly over the
        vocabulary (Szegedy et al. 2016, arXiv:1512.00567, section 7).

        No rank sees the others' logits: a maximum, sums and the target's logit [N] are all that they exchange.
        """
        if self.size == 1:
            return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        return _CrossEntropy.apply(logits, targets, vocab, self.group, smoothing)

    def sparse_cross_entropy(self, logits: Tensor, targets: Tensor, vocab: Span, k: int) -> Tensor:
        """As `cross_entropy`, with a softmax over the k largest logits: ln Σ exp(logits among them) - the target's.

        Of a target that is not among them, too; never below 0 (Sun et al. 2021, Sparse-softmax, arXiv:2112.12433).
        """
        counted = targets != IGNORED
        ours = counted & (targets >= vocab.start) & (targets < vocab.stop)
        target = logits.gather(1, (targets - vocab.start).where(ours, 0)[:, None])[:, 0] * ours
        largest = logits.topk(min(k, logits.shape[1]), dim=1).values
        if self.size > 1:
            target = _Leave.apply(target, self.group)
            width = min(k, -(-vocab.full // self.size))  # the widest of the ranks' parts
            mine = F.pad(largest, (0, width - largest.shape[1]), value=-torch.inf)
            slots = [mine if rank == self.rank else torch.zeros_like(mine) for rank in range(self.size)]
            largest = _Leave.apply(torch.cat(slots, 1), self.group).topk(min(k, vocab.full), dim=1).values
        top = largest[:, 0].detach()  # taken off first: of large logits, what rounding leaves of the loss is little
        return ((largest - top[:, None]).logsumexp(1) - (target - top)).where(counted, 0).sum()


def reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """[…] -> […]: the sum over a group, or another `op`, without a gradient."""
    y: Tensor = torch.ops._c10d_functional.all_reduce(x.contiguous(), op, group)
    return _waited(y)


def _gather(x: Tensor, group: Group, size: int) -> Tensor:
    """[B S/n D] -> [B S D]."""
    y: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)  # [n·B S/n D]
    y = _waited(y)
    return y.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


def _scatter(x: Tensor, group: Group, size: int) -> Tensor:
    """Partial sums [B S D] -> [B S/n D]."""
    parts = x.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)  # [n·B S/n D]
    y: Tensor = torch.ops._c10d_functional.reduce_scatter_tensor(parts.contiguous(), "sum", size, group)
    return _waited(y)


def _waited(y: Tensor) -> Tensor:
    """What a collective gives, once it is there."""
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(y)  # type: ignore[no-any-return]
    with waiting():
        return torch.ops._c10d_functional.wait_tensor(y)  # type: ignore[no-any-return]


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce(grad, ctx.group), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce(grad, ctx.group), None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _gather(x, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grad, ctx.group, ctx.size), None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _scatter(x, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.group, ctx.size), None, None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab: Span, group: Group, smoothing: float) -> Tensor:
        counted = targets != IGNORED
        ours = counted & (targets >= vocab.start) & (targets < vocab.stop)
        index = (targets - vocab.start).where(ours, 0)[:, None]
        shifted = logits - reduce(logits.amax(1, keepdim=True), group, "max")
        # What is aimed at: most of it the target's logit, the rest the mean of all.
        aim = shifted.gather(1, index)[:, 0] * ours * (1 - smoothing)
        if smoothing:
            aim += shifted.sum(1) * (smoothing / vocab.full)
        exponentials = shifted.exp_()
        total, aim = reduce(torch.stack([exponentials.sum(1), aim]), group)
        softmax = exponentials.mul_((counted / total)[:, None])
        if smoothing:
            softmax -= counted[:, None].to(softmax.dtype) * (smoothing / vocab.full)
        ctx.save_for_backward(softmax, index, ours)
        ctx.smoothing = smoothing
        return (total.log() - aim).where(counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, index, ours = ctx.saved_tensors
        sure = ours[:, None].to(softmax.dtype) * (ctx.smoothing - 1)
        return grad * softmax.scatter_add(1, index, sure), None, None, None, None
