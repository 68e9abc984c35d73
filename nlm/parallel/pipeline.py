"""Pipeline parallelism: which rank holds which layers, and the schedules of torch.distributed.pipelining."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

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


def split(config: ModelConfig, seq_len: int, n_stages: int, source_len: int | None = None) -> list[Part]:
    """The layers in `n_stages` parts of as nearly equal cost as can be, every layer in exactly one.

    Cost is in multiply-adds a row: a layer's matrices and its scores, the head's matrix, the embedding's one row.
    The layers go one by one to the stage that has least to do yet, the later of equals; where an encoder's cost other
    than a decoder's, neighbours then exchange layers while it helps the one that has more to do.
    """
    costs = _layer_costs(config, seq_len, source_len or seq_len)
    ends = [0.0] * n_stages
    ends[0] += seq_len * config.dim
    ends[-1] += seq_len * config.dim * config.vocab_size
    load, counts = list(ends), [0] * n_stages
    for _ in costs:
        stage = min(reversed(range(n_stages)), key=load.__getitem__)
        load[stage] += sum(costs) / len(costs)
        counts[stage] += 1
    borders = [0, *accumulate(counts)]

    def most(stage: int, border: int) -> float:
        """Of a stage and the next, with that border between them."""
        parts = (borders[stage], border), (border, borders[stage + 2])
        return max(sum(costs[slice(*part)], end) for part, end in zip(parts, ends[stage:], strict=False))

    moves = True
    while moves:
        moves = False
        for stage in range(n_stages - 1):
            here = borders[stage + 1]
            others = [b for b in (here - 1, here + 1) if borders[stage] <= b <= borders[stage + 2]]
            if others and most(stage, best := min(others, key=partial(most, stage))) < most(stage, here):
                borders[stage + 1], moves = best, True
    return [
        Part(range(start, stop), first=stage == 0, last=stage == n_stages - 1)
        for stage, (start, stop) in enumerate(pairwise(borders))
    ]


def _layer_costs(config: ModelConfig, seq_len: int, source_len: int) -> list[int]:
    """Of every layer, an encoder's first, for one row."""
    inner, kv = config.n_heads * config.head_dim, 2 * config.n_kv_heads * config.head_dim

    def attention(queries: int, keys: int) -> int:
        return config.dim * (queries * 2 * inner + keys * kv) + queries * keys * inner

    def layer(positions: int) -> int:
        return attention(positions, positions) + positions * config.dim * config.ffn_dim * (3 if config.gated else 2)

    encoder = config.n_encoder_layers or 0
    cross = attention(seq_len, source_len) if encoder else 0
    return [layer(source_len)] * encoder + [layer(seq_len) + cross] * config.n_layers


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
        zero_bubble = parallel.schedule in V_SCHEDULES
        self.deferred = {i: DeferredGradients(model).take if zero_bubble else None for i, model in self.stages.items()}
        self._shapes: tuple[torch.Size, ...] = ()

    def _schedule(self, part: Batch) -> Any:
        """Of microbatches like this one. A stage of torch's knows one shape: where that of the last step was another,
        there are new ones over the same modules, which takes at most some hundredths of a second."""
        tokens, stream = part.inputs.to("meta"), self._stream(part, "meta").requires_grad_()
        if (shapes := (tokens.shape, stream.shape)) != self._shapes:
            made = [self._stage(index, tokens, stream) for index in self.stages]
            name = self.config.parallel.schedule
            self.schedule = SCHEDULES[name](
                made if name != "1f1b" else made[0],  # type: ignore[arg-type]
                self.microbatches,
                loss_fn=lambda loss, _: loss * self.scale,
                scale_grads=False,
            )
            self._shapes = shapes
        return self.schedule

    def _stage(self, index: int, tokens: Tensor, stream: Tensor) -> PipelineStage:
        """Of microbatches [B S] with such a stream."""
        model = self.stages[index]
        loss = torch.empty((), device="meta", requires_grad=True)
        return PipelineStage(
            model,
            index,
            self.n_stages,
            self.mesh.device,
            input_args=(tokens if model.part.first else stream,),
            output_args=(loss if model.part.last else stream,),
            group=self.group,
            dw_builder=self.deferred[index],
        )

    def _stream(self, rows: Batch, device: str | torch.device) -> Tensor:
        """[B S/n D], or [B (S+T)/n D] with that of an encoder's source, empty."""
        read = [rows.inputs] if rows.source is None else [rows.inputs, rows.source]
        positions = sum(len(self.mesh.tp.positions(tokens.shape[1])) for tokens in read)
        dtype = torch.float64 if self.config.train.precision == "fp64" else torch.float32
        return torch.empty(len(rows), positions, self.config.model.dim, dtype=dtype, device=device)

    def train(self, rows: Batch) -> list[Tensor]:
        last = self.n_stages - 1 in self.stages
        losses: list[Tensor] = []
        given = {"source": rows.source, "targets": rows.targets, "segments": rows.segments, "keys": rows.keys}
        self._schedule(rows.first(len(rows) // self.microbatches)).step(
            *([rows.inputs] if 0 in self.stages else []),
            target=given["targets"] if last else None,
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
                x = self._pass_on(x, before, here, rows)
            if stage in self.stages:
                x = self.stages[stage](x, *rows.arguments()[1:])
        return x if self.n_stages - 1 in self.stages else torch.zeros((), device=self.mesh.device)

    def _pass_on(self, x: Tensor, source: int, target: int, rows: Batch) -> Tensor:
        """The stream of rows, from one pipeline rank to another; the others have nothing to do with it."""
        me = self.mesh.rank("pp")
        if me == source:
            dist.send(x.contiguous(), group=self.group, group_dst=target)
        elif me == target:
            x = self._stream(rows, self.mesh.device)
            dist.recv(x, group=self.group, group_src=source)
        return x
