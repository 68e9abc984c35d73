"""What drives the model: forward alone, or a step of forward and backward over the microbatches, and the update."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from nlm.batch import Batch
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.model import Transformer, held
from nlm.optim import (
    ContinualBackprop,
    RunningStatistics,
    WeightNormUpdate,
    clip_gradients,
    make_optimizer,
    projection,
)
from nlm.parallel.pieces import Pieces
from nlm.parallel.waits import backward_begins, backward_ended


class Inference:
    """Takes rows through this rank's parts of the stack, `models`, in step with the other ranks; `whole` describes all
    of it."""

    def __init__(self, config: Config, mesh: Mesh, models: Sequence[Transformer], whole: Transformer) -> None:
        self.config, self.mesh, self.models, self.whole = config, mesh, models, whole
        self.microbatches = config.parallel.microbatches
        for model in models:
            model.precision = config.train.precision

    def forward(self, rows: Batch) -> Tensor:
        """Rows -> [], their summed loss where the last layers are, 0 elsewhere."""
        return self.models[0](*rows.arguments())  # type: ignore[no-any-return]

    def loss(self, rows: Batch) -> Tensor:
        """Rows, the same on all ranks -> [], their summed loss, likewise."""
        size = self.mesh.data_size
        divides = len(rows) % size == 0
        mine = rows.chunk(size)[self.mesh.data_rank] if divides else rows
        parts = mine.to(self.mesh.device).chunk(self.microbatches)
        for model in self.models:
            model.eval()
        share = torch.stack([self.forward(part).double() for part in parts]).sum()
        for model in self.models:
            model.train()
        return self.total(share if divides else share / size)

    def total(self, share: Tensor) -> Tensor:
        """[] -> []: the sum over all ranks, in float64; tensor parallel ranks all have the same share."""
        share = share.double() if self.mesh.tp.rank == 0 else torch.zeros_like(share, dtype=torch.float64)
        return self.mesh.sum(share)


class Engine(Inference, ABC):
    """Drives this rank's parts of the stack, `models`, through training.

    A data parallel engine averages gradients over its ranks; each rank's loss is therefore scaled up by their
    number, so that what comes out is the gradient of the mean over all targets of the batch.
    """

    scale: float | Tensor

    def __init__(
        self, config: Config, mesh: Mesh, models: Sequence[Transformer], pieces: Pieces, whole: Transformer
    ) -> None:
        super().__init__(config, mesh, models, whole)
        self.pieces = pieces
        say = print if mesh.speaks else None
        self.optimizer = make_optimizer(pieces, config.optim, config.parallel.kernels, say)
        continual = config.optim.continual_backprop
        self._continual = continual and ContinualBackprop(continual, self.optimizer, models, whole, config.train.seed)
        self._project = projection(pieces, self.optimizer.already_unit)
        self._weight_norms = WeightNormUpdate(pieces, models)
        self._running = RunningStatistics(pieces, models, whole, config.train.batch_tokens)

    def forward_backward(self, rows: Batch) -> Tensor:
        """This rank's rows of a batch -> [], its share of the mean loss; the gradients are in place after."""
        self.scale = self.mesh.data_size / self.count(rows)
        self._running.begin()
        if self._continual:
            self._continual.begin()
        return self.share(self.train(rows))

    @abstractmethod
    def train(self, rows: Batch) -> list[Tensor]:
        """Forward and backward of all microbatches -> their losses, [] each, times `scale`."""

    def update(self, lr: float, left_out: Tensor | None = None) -> None:
        """One optimizer step at the learning rate `lr`, of nothing where `left_out` [] is true; after it the gradients
        are gone."""
        self.optimizer.step(lr, left_out)
        if self._continual:
            self._continual.update(self.optimizer.updates, left_out)
        self._project(left_out)
        self._weight_norms(lr, left_out)
        self._running.update(self.optimizer.updates, left_out)

    @property
    def shared(self) -> dict[str, Tensor]:
        """By name, the state that every rank has as a whole."""
        continual = self._continual.shared if self._continual else {}
        return self.optimizer.shared | continual | self.model_state

    @property
    def model_state(self) -> dict[str, Tensor]:
        """What of that belongs to the model, which has it under the same names."""
        return self._weight_norms.shared | self._running.shared

    def goes_on(self) -> None:
        """After parameters and state have been read."""
        self._weight_norms.place()
        self._running.place(self.optimizer.updates)

    def start_after(self, updates: int) -> None:
        """Goes on from pieces that were changed in place, after so many updates; the state is read later."""
        self.optimizer.start_after(updates)

    def share(self, losses: Iterable[Tensor]) -> Tensor:
        """The microbatches' losses, scaled, [] each -> [], this rank's share of the mean loss, in float64."""
        nothing = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return sum((loss.detach() for loss in losses), nothing) / self.mesh.data_size

    def count(self, rows: Batch) -> int | Tensor:
        """How many targets the ranks' rows of a batch have together; it takes no wait for the device."""
        if not rows.has_ignored:
            return self.config.train.batch_tokens
        return self.together(rows.n_targets()).clamp(min=1)  # a batch may have none

    def together(self, mine: Tensor) -> Tensor:
        """What a rank counts in its rows [] -> in those of all, which the ranks of a model's parts share."""
        first = self.mesh.tp.rank == 0 and self.mesh.rank("pp") == 0
        return self.mesh.sum(mine if first else torch.zeros_like(mine))

    def clip(self) -> tuple[Tensor, Tensor]:
        """-> the gradient's global norm [] and the norms of all parameters' gradients [P], before clipping."""
        gradients = self.pieces.reduce_gradients()
        self._running.look(gradients)
        return clip_gradients(self.pieces, gradients, self.config.optim.clip)


class TorchEngine(Engine):
    """An engine whose pieces are the parameters themselves, or their shards."""

    def __init__(self, config: Config, mesh: Mesh, models: Sequence[Transformer], whole: Transformer) -> None:
        weights = {h.name: h.weight for h in held(whole)}
        super().__init__(config, mesh, models, Pieces(models, mesh, weights), whole)

    def update(self, lr: float, left_out: Tensor | None = None) -> None:
        super().update(lr, left_out)
        for h in self.pieces.held:
            h.parameter.grad = None


class WholeEngine(TorchEngine):
    """The whole stack on every rank: alone, or under DDP, FSDP2 or HSDP, with tensor parallelism or without."""

    def __init__(self, config: Config, mesh: Mesh, model: Transformer) -> None:
        super().__init__(config, mesh, [model], model)
        self.model: torch.nn.Module = model
        if (group := mesh.group("dp_replicate")) and not isinstance(model, FSDPModule):
            self.model = DistributedDataParallel(
                model,
                process_group=group,
                gradient_as_bucket_view=True,
                init_sync=False,
                broadcast_buffers=False,
            )

    def train(self, rows: Batch) -> list[Tensor]:
        losses = []
        for i, part in enumerate(rows.chunk(self.microbatches)):
            with self._communicate(last=i + 1 == self.microbatches):
                loss = self.model(*part.arguments()) * self.scale
                if isinstance(self.model, DistributedDataParallel):
                    loss.register_hook(backward_begins)
                loss.backward()
            backward_ended()
            losses.append(loss.detach())
        return losses

    def _communicate(self, last: bool) -> AbstractContextManager[object]:
        """Gradients are reduced once a step, in the last microbatch's backward."""
        if isinstance(self.model, FSDPModule) and self.microbatches > 1:  # it walks through all modules
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()
