"""The Triton kernel of AdamW beside torch's where ranks hold parts of the weights: slices that are cut are projected
after it, by all ranks together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks

from nlm.batch import Batch
from nlm.build import build_engine, parse_config
from nlm.config import Config
from nlm.mesh import Mesh
from nlm.parallel.engine import Engine

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

LAYOUTS: list[dict[str, Any]] = [{"dp_shard": 2}, {"tp": 2}]


def test_two_ranks_update_as_without_it(make_config: Callable[..., Config]) -> None:
    config = make_config({"scheme": {"name": "ngpt"}, "n_layers": 1}, train={"precision": "fp64"})
    run_ranks(2, compare, config.model_dump(exclude_none=True))


def compare(rank: int, table: dict[str, Any]) -> None:
    tokens = torch.randint(table["model"]["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(rank))

    def trained(layout: dict[str, Any], **kernels: Any) -> Engine:
        config = parse_config(table | {"parallel": layout | kernels})
        engine = build_engine(config, Mesh(config.parallel))
        for _ in range(3):
            engine.forward_backward(Batch(tokens))
            engine.clip()
            engine.update(1e-2, torch.tensor(False))
        return engine

    for layout in LAYOUTS:
        plain = trained(layout)
        with torch.compiler.set_stance("force_eager"):
            ours = trained(layout, compile=True, kernels="triton")
        cut = [
            h
            for h in ours.pieces.held
            if (axis := ours.pieces.scheme.unit_axis(h.weight)) is not None and not h.spans[axis].is_whole
        ]
        assert bool(cut) == ("dp_shard" in layout) and ours.optimizer.already_unit
        for h, w in zip(plain.pieces.held, ours.pieces.tensors, strict=True):
            assert (w - h.tensor).norm() <= 1e-11 * h.tensor.norm(), (layout, h.name)
