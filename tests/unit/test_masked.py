"""Encoders: what they read, what they are to predict, and that they learn it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlm import load_checkpoint
from nlm.anatomy import IGNORED
from nlm.batch import Batch
from nlm.config import Config
from nlm.data import TokenShard
from nlm.data.masked import stand_ins
from nlm.data.rank import RankData
from nlm.mesh import Mesh
from nlm.random import mixed
from nlm.train import train

RunConfig = Callable[..., Config]
ENCODER = {"architecture": "encoder", "vocab_size": 258}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_stands_in_for_the_chosen_tokens() -> None:
    """15 % of the tokens, of which 80 % become the mask, 10 % another token and 10 % stay."""
    n_rows, length, mask = 400, 200, 99
    tokens = torch.randint(mask, (n_rows, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens, stand_ins=stand_ins(tokens, mixed(torch.arange(n_rows)), mask + 1, 0.15))
    read, targets = batch.inputs, batch.targets
    asked, inside = targets != IGNORED, tokens[:, :-1]
    assert (targets[asked] == inside[asked]).all() and (read[~asked] == inside[~asked]).all()
    assert float(asked.double().mean()) == pytest.approx(0.15, abs=0.005)
    is_mask, stays = read == mask, read == inside
    assert float(is_mask[asked].double().mean()) == pytest.approx(0.8, abs=0.01)
    assert float(stays[asked].double().mean()) == pytest.approx(0.1 + 0.1 / mask, abs=0.01)
    others = read[asked & ~is_mask & ~stays]
    assert others.bincount(minlength=mask).min() > 0 and others.max() < mask
    assert asked.double().mean(0).std() < 1.3 * (0.15 * 0.85 / n_rows) ** 0.5, "every place alike"
    assert float(batch.n_targets()) == asked.sum()


def test_every_step_and_every_part_has_its_own(run_config: RunConfig) -> None:
    """Rows of one number have the same places hidden, whatever the batch is divided into; other rows others."""
    data = RankData(run_config("run", ENCODER), Mesh())
    first, again, second = data.rows(1), data.rows(1), data.rows(2)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.targets == IGNORED, second.targets == IGNORED)
    halves = first.chunk(2)
    assert torch.equal(torch.cat([half.inputs for half in halves]), first.inputs)
    assert torch.equal(torch.cat([half.targets for half in halves]), first.targets)


def test_the_mask_is_one_token_more(run_config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"expected more than \d+, a token in .*, for an encoder to one more"):
        train(run_config("run", ENCODER | {"vocab_size": 257}))


def test_no_document_sees_another(run_config: RunConfig) -> None:
    config = run_config("run", ENCODER, train={"steps": 1})
    model, _ = load_checkpoint(train(config) / "checkpoints/step-00000001")
    tokens = torch.arange(20)[None]
    segments = torch.zeros_like(tokens)
    segments[:, 8:] = 1
    whole, apart = model(tokens), model(tokens, segments=segments)
    assert torch.allclose(apart[:, :8], model(tokens[:, :8]), atol=1e-5)
    assert not torch.allclose(apart[:, :8], whole[:, :8], atol=1e-3)


def test_an_encoder_learns(run_config: RunConfig, shard: str) -> None:
    """More than how frequent a byte is, and that one in ten is not hidden."""
    p = np.bincount(TokenShard(shard).tokens[:].astype(np.int64)) / TokenShard(shard).n_tokens
    config = run_config(
        "learns",
        ENCODER,
        train={"steps": 300, "batch_tokens": 512, "masked_share": 0.3},
        optim={"lr": 1e-2, "warmup_steps": 10},
        log={"every": 300},
        data={"train": shard, "validation": shard},
    )
    last = metrics(run := train(config))[-1]
    assert last["validation_loss"] < -0.9 * (p[p > 0] * np.log(p[p > 0])).sum() - 0.2
    model, _ = load_checkpoint(run / "checkpoints/step-00000300")
    batches = list(RankData(config, Mesh()).validation_batches() or ())
    right = sum(int((model(batch.inputs).argmax(-1) == batch.targets).sum()) for batch in batches)
    assert last["validation_accuracy"] == pytest.approx(right / sum(int(batch.n_targets()) for batch in batches))
    assert last["validation_accuracy"] > p.max(), "better than always the most frequent byte"


def test_microbatches_change_nothing(run_config: RunConfig) -> None:
    losses = []
    for n in (1, 4):
        parallel, precision = {"microbatches": n}, {"precision": "fp64"}
        losses.append(
            [m["loss"] for m in metrics(train(run_config(f"{n}", ENCODER, train=precision, parallel=parallel)))]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][0] == pytest.approx(np.log(258), rel=0.1), "the mean over what is asked, not over all tokens"
