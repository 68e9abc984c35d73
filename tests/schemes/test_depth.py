"""A thousand layers (2,000 sublayers) of every scheme, by the real loop on real text."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nlm import SCHEMES, load_checkpoint, read_layers
from nlm.config import Config
from nlm.train import train

RunConfig = Callable[..., Config]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_thousand_layers_stay_finite(scheme: str, run_config: RunConfig, tmp_path: Path) -> None:
    model = {"scheme": {"name": scheme}, "n_layers": 1000, "dim": 16, "n_heads": 2, "ffn_dim": 16}
    run = train(run_config("deep", model, train={"steps": 3, "batch_tokens": 64}))
    layers = read_layers(run)
    assert layers.pop("step").tolist() == [1, 2, 3]
    for name, values in layers.items():
        assert values.shape == (3, 1000)
        assert np.isfinite(values).all(), name
    trained, _ = load_checkpoint(run / "checkpoints" / "step-00000003")
    assert all(parameter.isfinite().all() for parameter in trained.parameters())
