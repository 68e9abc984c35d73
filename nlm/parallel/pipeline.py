"""Pipeline parallelism: which rank holds which layers, and the schedules of torch.distributed.pipelining."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from nlm.batch import Batch
from nlm.config import Config, ModelConfig, ParallelConfig
from nlm.layout import V_SCHEDULES
from nlm.mesh import Mesh
from nlm.model import Part, Transformer
from nlm.parallel.deferred import DeferredGradients
from nlm.parallel.engine import TorchEngine

SCHEDULES = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def split(config: ModelConfig, seq_len: int, n_stages: int) -> list[Part]:
    """The stack in `n_stages` parts of as nearly equal cost as can be, every layer in exactly one.

    Cost is in multiply-adds a token: a layer's matrices and its scores, the head's matrix, the embedding's one row.
    The layers go one by one to the stage that has least to do yet, the later of equals.
    """
    kv = 2 * config.n_kv_heads * config.head_dim
    attention = config.dim * (2 * config.n_heads * config.head_dim + kv) + seq_len * config.n_heads * config.head_dim
    layer = attention + config.dim * config.ffn_dim * (3 if config.gated else 2)
    load = [0.0] * n_stages
    load[0] += config.dim
    load[-1] += config.dim * config.vocab_size
    counts = [0] * n_stages
    for _ in range(config.n_layers):
        stage = min(reversed(range(n_stages)), key=load.__getitem__)
        load[stage] += layer
        counts[stage] += 1
    parts, start = [], 0
    for stage, count in enumerate(counts):
        parts.append(Part(range(start, start + count), first=stage == 0, last=stage == n_stages - 1))
        start += count
    return parts


def stages_of(rank: int, parallel: ParallelConfig) -> list[int]:
    """Which stages a pipeline rank holds: every pp-th, or for the V its own going down and coming back."""
    if parallel.schedule in V_SCHEDULES:
        return [rank, parallel.n_stages - 1 - rank]
    return list(range(rank, parallel.n_stages, parallel.pp))


class PipelineEngine(TorchEngine):
    """This rank's stages of the pipeline, driven by one of torch's schedules."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        models: Sequence[Transformer],
        whole: Transformer,
        stages: Sequence[int],
    ) -> None:
        super().__init__(config, mesh, models, whole)
        parallel = config.parallel
        self.n_stages = parallel.n_stages
        self.stages = dict(zip(stages, models, strict=True))
        self.group = mesh.group("pp")
        self.stage_ranks = {stage: rank for rank in range(parallel.pp) for stage in stages_of(rank, parallel)}
        made = [self._stage(index, model) for index, model in self.stages.items()]
        make = SCHEDULES[parallel.schedule]
        self.schedule = make(
            made if parallel.schedule != "1f1b" else made[0],  # type: ignore[arg-type]
            self.microbatches,
            loss_fn=lambda loss, _: loss * self.scale,
            scale_grads=False,
        )

    def _stage(self, index: int, model: Transformer) -> PipelineStage:
        rows = self.config.batch_rows // self.mesh.data_size // self.microbatches
        part = model.part
        stream = self._stream(rows, "meta").requires_grad_()
        tokens = torch.empty(rows, self.config.train.seq_len, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        zero_bubble = self.config.parallel.schedule in V_SCHEDULES
        return PipelineStage(
            model,
            index,
            self.n_stages,
            self.mesh.device,
            input_args=(tokens if part.first else stream,),
            output_args=(loss if part.last else stream,),
            group=self.group,
            dw_builder=DeferredGradients(model).take if zero_bubble else None,
        )

    def _stream(self, rows: int, device: str | torch.device) -> Tensor:
        """[B S/n D], empty."""
        positions = len(self.mesh.tp.positions(self.config.train.seq_len))
        dtype = torch.float64 if self.config.train.precision == "fp64" else torch.float32
        return torch.empty(rows, positions, self.config.model.dim, dtype=dtype, device=device)

    def train(self, rows: Batch) -> list[Tensor]:
        last = self.n_stages - 1 in self.stages
        losses: list[Tensor] = []
        given = {"targets": rows.targets if last else None, "segments": rows.segments, "keys": rows.keys}
        self.schedule.step(
            *([rows.inputs] if 0 in self.stages else []),
            target=rows.targets if last else None,
            losses=losses if last else None,
            return_outputs=False,
            **{name: tensor for name, tensor in given.items() if tensor is not None},
        )
        return losses

    def forward(self, rows: Batch) -> Tensor:
        x = rows.inputs
        for stage in range(self.n_stages):
            here, before = self.stage_ranks[stage], self.stage_ranks.get(stage - 1)
            if before is not None and before != here:
                x = self._pass_on(x, before, here, len(rows))
            if stage in self.stages:
                x = self.stages[stage](x, *rows.arguments()[1:])
        return x if self.n_stages - 1 in self.stages else torch.zeros((), device=self.mesh.device)

    def _pass_on(self, x: Tensor, source: int, target: int, rows: int) -> Tensor:
        """The stream, from one pipeline rank to another; the others have nothing to do with it."""
        me = self.mesh.rank("pp")
        if me == source:
            dist.send(x.contiguous(), group=self.group, group_dst=target)
        elif me == target:
            x = self._stream(rows, self.mesh.device)
            dist.recv(x, group=self.group, group_src=source)
        return x
