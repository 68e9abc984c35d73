"""What the ranks hold of the parameters, as plain tensors, and what only all of them together know of them."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nlm.anatomy import Weight
from nlm.mesh import Mesh
from nlm.model import Held, Transformer, held

STACK_ELEMENTS = {"cpu": 2**18, "cuda": 2**22}
"""How much is stacked to be one operation instead of one a piece: enough for that, no more than a cache holds."""
BUCKET_ELEMENTS = 2**23
"""How much one collective carries: enough that its latency does not matter, little beside a model."""


class Pieces:
    """This rank's pieces of the parameters of `models`, its parts of the stack.

    Optimizer, clipping, projection, statistics and checkpoints work on them, so that none needs to know the layout.
    `weights` has the parameters of the whole model, in its order; vectors [P] follow it. `pieces` are for an engine
    that divides the parameters in its own way, perhaps into several pieces each.
    """

    exact_elements = 2**14
    """Of how many torch takes the norm on the CPU without losing digits: of 50 million it is off by 0.4 %."""

    def __init__(
        self,
        models: Sequence[Transformer],
        mesh: Mesh | None = None,
        weights: Mapping[str, Weight] | None = None,
        pieces: Sequence[Held] | None = None,
    ) -> None:
        self.mesh, self.scheme = mesh or Mesh(), models[0].scheme
        self.held = [h for model in models for h in held(model)] if pieces is None else pieces
        self.weights = weights or {h.name: h.weight for h in self.held}
        self.tensors = [h.tensor for h in self.held]
        self.names = [h.name for model in models for h in held(model)]
        """The parameters of this rank's parts of the stack, of which it may hold no piece."""
        sizes, tp = self.mesh.sizes, self.mesh.tp
        # A tied table stands at both ends of a pipeline: one parameter, held twice and counted once.
        ends = [i for i, h in enumerate(self.held) if h.name == "embed.weight"]
        self._tied = ends if sizes["pp"] > 1 and models[0].config.tied else []
        again = self._tied[1:] if models[0].part.first else self._tied
        self._partial = [i for i, h in enumerate(self.held) if h.is_partial(tp)]
        self._average = list(range(len(self.held))) if sizes["pp"] > 1 and sizes["dp_shard"] == 1 else []
        self.counted = [
            i
            for i, h in enumerate(self.held)
            if i not in again and self.mesh.rank("dp_replicate") == 0 and (h.divided or tp.rank == 0)
        ]
        """Which pieces this rank stands for, so that the ranks together have everything once."""
        order = {name: i for i, name in enumerate(self.weights)}
        self.numbers = torch.tensor([order[h.name] for h in self.held], device=self.mesh.device)
        """[N]: of each piece, the number of its parameter."""
        self._stacked = self._same_shapes()
        places = [order[self.held[i].name] for same in self._stacked for i in same]
        self._places = torch.tensor(places, dtype=torch.int64, device=self.mesh.device)

    def _same_shapes(self) -> list[list[int]]:
        """What this rank stands for, in runs of one shape that are just large enough."""
        by_shape = defaultdict[torch.Size, list[int]](list)
        for i in self.counted:
            by_shape[self.tensors[i].shape].append(i)
        runs = []
        for shape, same in by_shape.items():
            n = max(1, STACK_ELEMENTS[self.mesh.device.type] // max(1, shape.numel()))
            runs += [same[at : at + n] for at in range(0, len(same), n)]
        return runs

    def gradients(self) -> list[Tensor]:
        """The gradients of the pieces, plain tensors that share their memory."""
        gradients = []
        for h in self.held:
            gradient = h.parameter.grad
            assert gradient is not None, f"{h.name} has no gradient"
            # The attribute: `to_local` costs a hundred times more, which counts with thousands of parameters.
            gradients.append(gradient._local_tensor if isinstance(gradient, DTensor) else gradient)
        return gradients

    def reduce_gradients(self) -> list[Tensor]:
        """After the last backward of a step: completes what the data parallel engine does not -> the gradients."""
        gradients = self.gradients()
        if group := self.mesh.group("dp_replicate"):
            all_reduce([gradients[i] for i in self._average], group, 1 / group.size())
        if self._tied:
            self._sum_tied([gradients[i] for i in self._tied])
        if group := self.mesh.group("tp"):
            all_reduce([gradients[i] for i in self._partial], group)
        return gradients

    def _sum_tied(self, gradients: list[Tensor]) -> None:
        first, *others = gradients
        for other in others:
            first += other
        if self.mesh.ends is not None and not others:
            dist.all_reduce(first, group=self.mesh.ends)
        for other in others:
            other.copy_(first)

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors, one a piece -> [P], their norms over the whole parameters, in float64, the same on every rank."""
        return self.mesh.sum(self.squares(tensors)).sqrt()

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors, one a piece -> [P], the sums of squares of what this rank stands for.

        Squares of vanishing gradients leave float32's range, hence float64.
        """
        return self.joined([self.square_sums(stack) for stack in self.stacks(tensors)])

    def stacks(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Tensors, one a piece -> what this rank stands for of them, a few of one shape at a time [n …]; one alone
        without a copy."""
        for same in self._stacked:
            first, *others = (tensors[i] for i in same)
            yield torch.stack([first, *others]) if others else first[None]

    def square_sums(self, stack: Tensor) -> Tensor:
        """[n …] -> [n], in float64."""
        rows = stack.reshape(len(stack), stack[0].numel())
        parts = rows.split(self.exact_elements, 1) if rows.device.type == "cpu" else [rows]
        return torch.stack([torch.linalg.vector_norm(part, dim=1).double().square() for part in parts]).sum(0)

    def joined(self, square_sums: list[Tensor]) -> Tensor:
        """Those of `stacks`, in their order -> [P]."""
        squares = torch.zeros(len(self.weights), dtype=torch.float64, device=self.mesh.device)
        return squares.index_add_(0, self._places, torch.cat(square_sums)) if square_sums else squares

    def which(self, is_so: Callable[[Weight], bool]) -> Tensor:
        """[P] bool: of which parameters it is so."""
        return torch.tensor([is_so(weight) for weight in self.weights.values()], device=self.mesh.device)

    def each(self, values: Tensor) -> tuple[Tensor, ...]:
        """One number a parameter [P] -> each piece's, [] each, of the kind of the pieces."""
        return values[self.numbers].to(self.tensors[0]).unbind()


def all_reduce(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None, factor: float = 1.0) -> None:
    """In place: the sum over the ranks times `factor`, in few collectives."""
    for bucket in _buckets(tensors):
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat, group=group)
        flat *= factor
        parts = flat.split([t.numel() for t in bucket])
        torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in runs just large enough to fill a collective."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        bucket.append(tensor)
        filled += tensor.numel()
        if filled >= BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
    if bucket:
        yield bucket
