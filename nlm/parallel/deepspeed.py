"""DeepSpeed as the engine: ZeRO 0 to 3, and offload, behind the same pieces of the parameters as every other engine.

ZeRO flattens the parameters and cuts the result anywhere: what a rank has of a matrix is up to three rectangles, each
of which is a piece. Attributes that DeepSpeed does not document are those of version 0.19.8.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor

from nlm.anatomy import Span, Weight
from nlm.config import Config
from nlm.init import to_unit
from nlm.mesh import Mesh
from nlm.model import Block, Held, Transformer, held
from nlm.optim import adamw, projection
from nlm.parallel.engine import MOMENTS, Engine, state_after
from nlm.parallel.pieces import Pieces, all_reduce


@dataclass(frozen=True)
class Place:
    """Where a piece lies: in a flat buffer of master weights, and in a gradient of the buffer's group."""

    buffer: int
    offset: int
    gradient: int
    gradient_offset: int
    shape: tuple[int, ...]

    def view(self, flat: Tensor, offset: int) -> Tensor:
        return flat.detach().view(-1)[offset:][: torch.Size(self.shape).numel()].view(self.shape)


class DeepSpeedEngine(Engine):
    """The whole stack on every rank; its optimizer state, gradients and parameters divided as ZeRO does."""

    def __init__(self, config: Config, mesh: Mesh, model: Transformer, weights: Mapping[str, Weight]) -> None:
        self.stage = config.parallel.zero or 0
        self.whole = list(held(model))  # ZeRO-3 empties the parameters
        optimizer = adamw(((h.parameter, h.weight) for h in self.whole), model.scheme, config.optim)
        self.engine = self._initialize(config, model, optimizer)
        self.zero = self.engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer if self.stage else self.zero
        self.buffers = self._buffers()
        self.places: list[Place] = []
        pieces = []
        for h, place in self._rectangles():
            pieces.append(h)
            self.places.append(place)
        zero_pieces = ZeroPieces([model], mesh, weights, pieces)
        zero_pieces.engine = self
        super().__init__(config, mesh, [model], zero_pieces)
        self._project = projection(self.pieces)
        axes = ((h, model.scheme.unit_axis(h.weight)) for h in self.whole)
        self._unit = [(h, axis) for h, axis in axes if axis is not None]

    def _initialize(self, config: Config, model: Transformer, optimizer: torch.optim.Optimizer) -> Any:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On CPU it would compile a collective that nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if self.stage == 3:
            deepspeed.utils.set_z3_leaf_modules(model, [Block])  # gathered whole, not matrix by matrix
        elements = sum(h.tensor.numel() for h in self.whole)
        options = settings(self.stage, config.parallel.offload, elements)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)[0]

    def forward_backward(self, rows: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for i, part in enumerate(rows.chunk(self.microbatches)):
            # By the engine, never by the model: ZeRO-3 knows from it that the next gradient is to be added.
            summed = self.engine(part[:, :-1], part[:, 1:])
            self.engine.set_gradient_accumulation_boundary(i + 1 == self.microbatches)
            self.engine.backward(summed * self.scale, scale_wrt_gas=False)
            loss += summed.detach()
        return loss / self.config.train.batch_tokens

    def forward(self, rows: Tensor) -> Tensor:
        return self.engine(rows[:, :-1], rows[:, 1:])  # type: ignore[no-any-return]

    def update(self, lr: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self.engine.step()
        if not self._unit:
            return
        if self.stage == 3:
            self._project()
            self._copy_masters()
            return
        with torch.no_grad():
            for h, axis in self._unit:
                to_unit(h.parameter, axis)
            self._copy_to_masters()

    def moments(self) -> dict[str, list[Tensor]]:
        state = self.optimizer.state
        return {key: [p.view(state[self.buffers[p.buffer]][key], p.offset) for p in self.places] for key in MOMENTS}

    @torch.no_grad()
    def start_after(self, step: int) -> None:
        self._copy_masters()
        for buffer in self.buffers:
            self.optimizer.state[buffer] = state_after(step, buffer)

    # What knows DeepSpeed's inside.

    def _buffers(self) -> list[Tensor]:
        """The flat master weights of each group; at stage 0 the parameters themselves."""
        match self.stage:
            case 0:
                return [h.parameter for h in self.whole]
            case 1 | 2:
                return self.zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]
            case _:
                return self.zero.fp32_partitioned_groups_flat  # type: ignore[no-any-return]

    def _fragments(self) -> Iterator[tuple[Held, int, int, Place]]:
        """What this rank has of each flattened parameter: elements [start, stop), which lie one after another."""
        whole = {h.parameter: h for h in self.whole}
        rank = self.engine.data_parallel_group.rank()
        if self.stage == 0:
            for i, h in enumerate(self.whole):
                yield h, 0, h.tensor.numel(), Place(i, 0, 0, 0, ())
        elif self.stage < 3:
            for i, group in enumerate(self.zero.bit16_groups):
                first, last = (r * self.buffers[i].numel() for r in (rank, rank + 1))
                end, gradient = 0, 0
                for parameter in group:
                    begin, end = end, end + parameter.numel()
                    if (start := max(begin, first)) < (stop := min(end, last)):
                        place = Place(i, start - first, gradient, 0, ())
                        yield whole[parameter], start - begin, stop - begin, place
                        gradient += 1
        else:
            for i, group in enumerate(self.zero.fp16_groups):
                offset = 0
                for gradient, parameter in enumerate(group):
                    size = parameter.partition_numel()  # the last one is padded
                    start, stop = (min(r * size, parameter.ds_numel) for r in (rank, rank + 1))
                    if start < stop:
                        yield whole[parameter], start, stop, Place(i, offset, gradient, 0, ())
                    offset += size

    def _rectangles(self) -> Iterator[tuple[Held, Place]]:
        for h, start, stop, place in self._fragments():
            for at, spans in rectangles(start, stop, h.weight.shape):
                shape = tuple(len(span) for span in spans)
                place_ = replace(place, offset=place.offset + at - start, gradient_offset=at - start, shape=shape)
                tensor = place_.view(self.buffers[place.buffer], place_.offset)
                yield replace(h, tensor=tensor, spans=spans), place_

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
            for h in self.whole:
                h.parameter.zero_()
            for h in self.pieces.held:
                h.part_of(h.parameter.data).copy_(h.tensor)
            all_reduce([h.parameter.data for h in self.whole])
        elif self.stage == 3:
            for h, place in zip(self.pieces.held, self.places, strict=True):
                partition: Tensor = h.parameter.ds_tensor.data  # type: ignore[attr-defined]
                partition[place.gradient_offset :][: h.tensor.numel()].copy_(h.tensor.flatten())

    @torch.no_grad()
    def _copy_to_masters(self) -> None:
        if self.stage in (1, 2):
            for h in self.pieces.held:
                h.tensor.copy_(h.part_of(h.parameter.data))


class ZeroPieces(Pieces):
    """Pieces whose gradients DeepSpeed has."""

    engine: DeepSpeedEngine

    def gradients(self) -> list[Tensor]:
        return [self.engine.gradient(place) for place in self.engine.places]


def rectangles(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[Span, ...]]]:
    """Elements [start, stop) of a flattened vector or matrix -> where each rectangle of them starts, and its spans."""
    if len(shape) == 1:
        yield start, (Span(start, stop, shape[0]),)
        return
    rows, columns = shape
    while start < stop:
        row, column = divmod(start, columns)
        width = min(stop - start, columns - column)
        height = (stop - start) // columns if width == columns else 1
        yield start, (Span(row, row + height, rows), Span(column, column + width, columns))
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
