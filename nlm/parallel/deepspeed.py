"""DeepSpeed as the engine: ZeRO 0 to 3, and offload, behind the same pieces of the parameters as every other engine.

ZeRO flattens the parameters and cuts the result anywhere: what a rank has of a matrix is up to three rectangles, each
of which is a piece. Attributes that DeepSpeed does not document are those of version 0.19.8.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor

from nlm.anatomy import Span
from nlm.batch import Batch
from nlm.config import Config
from nlm.mesh import Mesh, MeshAxis
from nlm.model import Block, Held, Transformer, held
from nlm.parallel.engine import Engine
from nlm.parallel.pieces import Pieces, all_reduce


@dataclass(frozen=True)
class Place:
    """Where a piece lies: in a flat buffer of master weights, in a gradient of the buffer's group, in its parameter."""

    buffer: int
    offset: int
    gradient: int
    gradient_offset: int
    parameter_offset: int
    shape: tuple[int, ...]

    def view(self, flat: Tensor, offset: int) -> Tensor:
        return flat.detach().view(-1)[offset:][: torch.Size(self.shape).numel()].view(self.shape)


class DeepSpeedEngine(Engine):
    """The whole stack on every rank; its optimizer state, gradients and parameters divided as ZeRO does."""

    def __init__(self, config: Config, mesh: Mesh, model: Transformer) -> None:
        self.stage = config.parallel.zero or 0
        self.parameters = list(held(model))  # ZeRO-3 empties the parameters
        for h in self.parameters:
            if h.is_partial(mesh.tp):  # completed as it comes, before it is reduced and cut
                h.parameter.register_hook(mesh.tp.sum)
        self.engine = self._initialize(config, mesh, model)
        self.zero = self.engine.optimizer
        self.buffers = self._buffers()
        self.places: list[Place] = []
        pieces = []
        for h, place in self._rectangles():
            pieces.append(h)
            self.places.append(place)
        zero_pieces = ZeroPieces([model], mesh, {h.name: h.weight for h in self.parameters}, pieces)
        zero_pieces.engine = self
        super().__init__(config, mesh, [model], zero_pieces, model)

    def _initialize(self, config: Config, mesh: Mesh, model: Transformer) -> Any:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On CPU it would compile a collective that nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [Block])  # gathered whole, not matrix by matrix
        elements = sum(h.tensor.numel() for h in self.parameters)
        options = settings(self.stage, config.parallel.offload, elements)
        mpu = Groups(mesh, "dp_shard" if self.stage else "dp_replicate") if mesh.tp.size > 1 else None
        return deepspeed.initialize(
            model=model, optimizer=Idle(model.parameters()), config=options, mpu=mpu, dist_init_required=False
        )[0]

    def train(self, rows: Batch) -> list[Tensor]:
        losses = []
        for i, part in enumerate(rows.chunk(self.microbatches)):
            # By the engine, never by the model: ZeRO-3 knows from it that the next gradient is to be added.
            loss = self.engine(*part.arguments()) * self.scale
            self.engine.set_gradient_accumulation_boundary(i + 1 == self.microbatches)
            self.engine.backward(loss, scale_wrt_gas=False)
            losses.append(loss.detach())
        return losses

    def forward(self, rows: Batch) -> Tensor:
        return self.engine(*rows.arguments())  # type: ignore[no-any-return]

    def update(self, lr: float, left_out: Tensor | None = None) -> None:
        super().update(lr, left_out)  # of the master weights
        self.engine.step()  # which become the model's

    def start_after(self, updates: int) -> None:
        super().start_after(updates)
        self._copy_masters()

    # What knows DeepSpeed's inside.

    def _buffers(self) -> list[Tensor]:
        """The flat master weights of each group; at stage 0 the parameters themselves."""
        match self.stage:
            case 0:
                return [h.parameter for h in self.parameters]
            case 1 | 2:
                return self.zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]
            case _:
                return self.zero.fp32_partitioned_groups_flat  # type: ignore[no-any-return]

    def _fragments(self) -> Iterator[tuple[Held, int, int, int, int, int]]:
        """What this rank has of each flattened parameter: elements start … stop-1, and where they are.

        That is the buffer, their offset in it, and the number of their gradient in the buffer's group.
        """
        whole = {h.parameter: h for h in self.parameters}
        rank = self.engine.data_parallel_group.rank()
        if self.stage == 0:
            for i, h in enumerate(self.parameters):
                yield h, 0, h.tensor.numel(), i, 0, 0
        elif self.stage < 3:
            for i, group in enumerate(self.zero.bit16_groups):
                first, last = (r * self.buffers[i].numel() for r in (rank, rank + 1))
                end, gradient = 0, 0
                for parameter in group:
                    begin, end = end, end + parameter.numel()
                    if (start := max(begin, first)) < (stop := min(end, last)):
                        yield whole[parameter], start - begin, stop - begin, i, start - first, gradient
                        gradient += 1
        else:
            for i, group in enumerate(self.zero.fp16_groups):
                offset = 0
                for gradient, parameter in enumerate(group):
                    size = parameter.partition_numel()  # the last one is padded
                    start, stop = (min(r * size, parameter.ds_numel) for r in (rank, rank + 1))
                    if start < stop:
                        yield whole[parameter], start, stop, i, offset, gradient
                    offset += size

    def _rectangles(self) -> Iterator[tuple[Held, Place]]:
        for h, start, stop, buffer, offset, gradient in self._fragments():
            for at, spans in rectangles(start, stop, h.spans):
                shape = tuple(len(span) for span in spans)
                place = Place(buffer, offset + at - start, gradient, at - start, at, shape)
                tensor = place.view(self.buffers[buffer], place.offset)
                yield replace(h, tensor=tensor, spans=spans), place

    def gradient(self, place: Place) -> Tensor:
        """After the last backward: the reduced gradient of a piece, in which `step` takes what stands there."""
        if self.stage == 0:
            flat = self.buffers[place.buffer].grad
        elif self.config.parallel.offload:
            return place.view(self.buffers[place.buffer].grad, place.offset)  # type: ignore[arg-type]
        else:
            flat = self.zero.averaged_gradients[place.buffer][place.gradient]
        assert flat is not None, "a parameter has no gradient"
        return place.view(flat, place.gradient_offset)

    @torch.no_grad()
    def _copy_masters(self) -> None:
        """The model's parameters from the master weights, copies of each other even in float32."""
        if self.stage in (1, 2):
            for h in self.parameters:
                h.parameter.zero_()
            for h, place in zip(self.pieces.held, self.places, strict=True):
                place.view(h.parameter, place.parameter_offset).copy_(h.tensor)
            all_reduce([h.parameter.data for h in self.parameters], self.engine.data_parallel_group)
        elif self.stage == 3:
            for h, place in zip(self.pieces.held, self.places, strict=True):
                partition: Tensor = h.parameter.ds_tensor.data  # type: ignore[attr-defined]
                partition[place.gradient_offset :][: h.tensor.numel()].copy_(h.tensor.flatten())


class Idle(torch.optim.Optimizer):
    """What DeepSpeed is given as its optimizer: the step is ours, on the pieces, before it."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


class ZeroPieces(Pieces):
    """Pieces whose gradients DeepSpeed has, already reduced."""

    engine: DeepSpeedEngine

    def gradients(self) -> list[Tensor]:
        return [self.engine.gradient(place) for place in self.engine.places]

    def reduce_gradients(self) -> list[Tensor]:
        return self.gradients()


class Groups:
    """The groups of a mesh with tensor parallel ranks, under the names by which DeepSpeed asks for them ("mpu")."""

    def __init__(self, mesh: Mesh, data_axis: MeshAxis) -> None:
        assert mesh.device_mesh is not None
        data, tp = mesh.device_mesh.get_group(data_axis), mesh.device_mesh.get_group("tp")
        self.get_data_parallel_group, self.get_model_parallel_group = lambda: data, lambda: tp
        self.get_data_parallel_rank, self.get_data_parallel_world_size = data.rank, data.size
        self.get_model_parallel_rank, self.get_model_parallel_world_size = tp.rank, tp.size


def rectangles(start: int, stop: int, spans: tuple[Span, ...]) -> Iterator[tuple[int, tuple[Span, ...]]]:
    """Elements [start, stop) of a flattened part of a vector or matrix -> each rectangle's first, and its spans."""
    if len(spans) == 1:
        yield start, (spans[0].inner(start, stop),)
        return
    rows, columns = spans
    while start < stop:
        row, column = divmod(start, len(columns))
        width = min(stop - start, len(columns) - column)
        height = (stop - start) // width if width == len(columns) else 1
        yield start, (rows.inner(row, row + height), columns.inner(column, column + width))
        start += height * width


def settings(stage: int, offload: bool, elements: int) -> dict[str, Any]:
    """What deepspeed.initialize is told, so that it trains as this package does."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(elements, 2**27),  # allocated as such, however small the model
        "overlap_comm": torch.cuda.is_available(),
    }
    if stage in (1, 2):
        zero["compute_grad_norm"] = False  # clipping has it, and a step is never left out in silence
    if stage == 3:
        zero["memory_efficient_linear"] = False  # would replace torch's own `linear` in the whole process
        zero["stage3_param_persistence_threshold"] = 0  # all parameters in the same way, small ones too
    if offload:
        device = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": device, "offload_param": device}
    return {
        # To DeepSpeed there is one microbatch: told of more, it would divide by their number.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The mean over the data parallel ranks: the sum, then division by their number.
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # a torch optimizer also under offload: nothing to compile
        "steps_per_print": None,
        "zero_optimization": zero,
    }
