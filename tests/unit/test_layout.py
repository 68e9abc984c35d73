"""Layouts that cannot work are refused with what would; no way of splitting a stack drops or repeats a layer."""

from collections.abc import Callable
from typing import Any

import pytest

from nlm.build import design
from nlm.config import Config, ConfigError
from nlm.model import held
from nlm.parallel.pipeline import split, stages_of

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    ("model", "parallel", "problem"),
    [
        (
            {"n_heads": 6, "dim": 48},
            {"tp": 4},
            "parallel.tp: expected a divisor of model.n_heads = 6 .*one of [1, 2, 3, 6]",
        ),
        ({"n_kv_heads": 2}, {"tp": 4}, "parallel.tp: expected a divisor of model.n_kv_heads = 2 .*one of [1, 2]"),
        ({"ffn_dim": 50}, {"tp": 4}, "parallel.tp: expected a divisor of model.ffn_dim = 50"),
        ({}, {"sequence_parallel": True}, "sequence_parallel: .* set parallel.tp > 1"),
        ({"n_heads": 8, "dim": 64}, {"tp": 8, "sequence_parallel": True}, "train.seq_len: expected a multiple of .* 8"),
        ({}, {"pp": 4, "microbatches": 4}, "make 4 stages, but there are 3 layers; lower parallel.pp"),
        ({}, {"pp": 2}, "parallel.microbatches: expected at least one for each of the 2 stages .* got 1"),
        ({"n_layers": 9}, {"pp": 2, "schedule": "zbv", "microbatches": 2}, "each of the 4 stages of 'zbv' .* got 2"),
        ({}, {"schedule": "zbv"}, "parallel.schedule: 'zbv' is of pipelines"),
        ({}, {"pp": 2, "microbatches": 2, "stages_per_rank": 2}, "stages_per_rank: is of the interleaved schedule"),
        (
            {"n_layers": 9},
            {"pp": 2, "schedule": "dualpipev", "microbatches": 4, "compile": True},
            "parallel.compile: 'dualpipev' puts weight gradients off",
        ),
        ({}, {"blocks_per_unit": 2}, "parallel.blocks_per_unit: is of FSDP2"),
        ({}, {"reshard": False, "dp_replicate": 2}, "parallel.reshard: is of FSDP2"),
        ({}, {"zero": 1, "dp_shard": 2}, "parallel.zero: is DeepSpeed's"),
        ({}, {"dp_replicate": 3, "microbatches": 2}, "dp_replicate · dp_shard = 72, got 48"),
        (
            {},
            {"engine": "deepspeed", "zero": 2, "dp_shard": 2, "pp": 2, "microbatches": 2},
            "parallel.pp: under DeepSpeed",
        ),
        (
            {},
            {"engine": "deepspeed", "zero": 1, "dp_replicate": 2},
            "parallel.dp_replicate: ZeRO 1 divides over dp_shard",
        ),
        ({}, {"engine": "deepspeed", "dp_shard": 2}, "parallel.dp_shard: ZeRO 0 replicates"),
        (
            {},
            {"engine": "deepspeed", "zero": 2, "dp_shard": 2, "offload": True},
            "parallel.offload: is for parallel.zero = 3",
        ),
    ],
)
def test_refused(model: dict[str, Any], parallel: dict[str, Any], problem: str, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=problem.replace("[", r"\[")):
        make_config(model, parallel=parallel)


def test_the_interleaved_schedule_goes_in_rounds(make_config: MakeConfig) -> None:
    parallel = {"pp": 2, "schedule": "interleaved", "microbatches": 5}
    with pytest.raises(ConfigError, match=r"rounds of parallel\.pp = 2; expected a multiple of it, got 5"):
        make_config({"n_layers": 9}, parallel=parallel, train={"batch_tokens": 60})


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"parallel": {"tp": 3, "sequence_parallel": True}},
            r"sequence_parallel: rows of pairs have multiples of 8 tokens, which parallel\.tp = 3 does not divide",
        ),
        ({"train": {"precision": "fp8"}}, "train.precision: 'fp8' expects a multiple of 16 tokens .* as they make"),
        (
            {"parallel": {"pp": 2, "microbatches": 2}, "evaluate": {"translations": 4}},
            "evaluate.translations: needs a whole model on a rank",
        ),
    ],
)
def test_what_pairs_cannot(sections: dict[str, dict[str, Any]], problem: str, make_config: MakeConfig) -> None:
    model = {"architecture": "encoder_decoder", "dim": 48, "n_heads": 6}
    with pytest.raises(ConfigError, match=problem):
        make_config(model, data={"train": {"path": "unused", "languages": ["de", "en"]}}, **sections)


def test_fp64_is_not_deepspeeds(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision: DeepSpeed's optimizers keep float32"):
        make_config(parallel={"engine": "deepspeed"}, train={"precision": "fp64"})


@pytest.mark.parametrize("n_layers", [8, 30, 97, 1000])
@pytest.mark.parametrize("vocab_size", [96, 20_000])
def test_every_layer_is_in_one_part(n_layers: int, vocab_size: int, make_config: MakeConfig) -> None:
    """In order, and no part has a layer more to do than another, the head's work counted in layers."""
    model = make_config({"n_layers": n_layers, "vocab_size": vocab_size}).model
    for n_stages in range(1, 9):
        parts = split(model, 12, n_stages)
        assert [l for part in parts for l in part.layers] == list(range(n_layers))
        assert [part.first for part in parts] == [True] + [False] * (n_stages - 1)
        assert [part.last for part in parts] == [False] * (n_stages - 1) + [True]
        # 4 · 32 · 32 of attention, 12 · 32 of its scores, 2 · 32 · 48 of the FFN
        head = 32 * vocab_size / (4 * 32 * 32 + 12 * 32 + 2 * 32 * 48)
        counts = [len(part.layers) for part in parts[:-1]] or [n_layers]
        assert max(counts) - min(counts) <= 1
        if counts[0] > 1 and parts[-1].layers and n_stages > 1:
            assert abs(len(parts[-1].layers) + head - max(counts)) <= 1


@pytest.mark.parametrize(("n_layers", "pp"), [(30, 4), (1000, 7)])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "dualpipev"])
def test_the_ranks_hold_every_parameter_once(n_layers: int, pp: int, schedule: str, make_config: MakeConfig) -> None:
    """By name, in the modules that the ranks really build."""
    config = make_config(
        {"n_layers": n_layers, "dim": 8, "n_heads": 2, "ffn_dim": 8},
        parallel={"pp": pp, "schedule": schedule, "microbatches": 14 * 4},
        train={"batch_tokens": 56 * 4, "seq_len": 4},
    )
    parts = split(config.model, 4, config.parallel.n_stages)
    stages = [stage for rank in range(pp) for stage in stages_of(rank, config.parallel)]
    assert sorted(stages) == list(range(config.parallel.n_stages))
    expected = [h.name for h in held(design(config))]
    found = [h.name for stage in stages for h in held(design(config, part=parts[stage]))]
    assert sorted(found) == sorted(expected)
