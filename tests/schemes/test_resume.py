"""A run that was interrupted is the run that was not, whatever it is made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from entries import ENCODERS, MIXED

from nlm.compare import differences
from nlm.config import Config
from nlm.optim import OPTIMIZERS
from nlm.schemes.inits import INITS
from nlm.train import train

RunConfig = Callable[..., Config]


def prove(run_config: RunConfig, model: dict[str, Any], **sections: Any) -> None:
    """Bit by bit: losses, gradient norms, statistics of every layer, parameters and all state."""
    keys = {"vocab_size": 258, "n_layers": 4, "n_kv_heads": 2, "activation": "swiglu", "stochastic_depth": 0.1}
    steps = {"steps": 4, "batch_tokens": 64}

    def run(name: str, **more: int) -> Path:
        return train(run_config(name, keys | model, train=steps | more, **sections))

    straight = run("straight")
    run("interrupted", stop_after=2)
    found = differences(straight, run("interrupted"))
    assert {"loss", "parameters", "optimizer"} <= set(found)
    assert {kind: difference.size for kind, difference in found.items() if difference.size} == {}


@pytest.mark.parametrize("model", (MIXED | ENCODERS).values(), ids=(MIXED | ENCODERS).keys())
def test_every_scheme_norm_score_and_weight_norm(model: dict[str, Any], run_config: RunConfig) -> None:
    prove(run_config, model)


@pytest.mark.parametrize("init", INITS)
def test_every_init(init: str, run_config: RunConfig) -> None:
    fields = {"base_dim": 16} if init == "mup" else {}
    prove(run_config, {"scheme": {"name": "pre_ln"}, "init": {"name": init} | fields})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, run_config: RunConfig) -> None:
    own = {"free_steps": 3} if optimizer == "lawn" else {}
    prove(run_config, {"scheme": {"name": "pre_ln"}}, optim={"name": optimizer, "agc": 0.05, "centralize": True} | own)
