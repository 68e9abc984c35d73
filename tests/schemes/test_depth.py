"""A thousand layers (2,000 sublayers) of every scheme, on real text."""

from collections.abc import Callable

import pytest

from nlm import SCHEMES
from nlm.build import build_engine
from nlm.config import Config
from nlm.data.rank import RankData
from nlm.mesh import Mesh

RunConfig = Callable[..., Config]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_thousand_layers_stay_finite(scheme: str, run_config: RunConfig) -> None:
    model = {"scheme": {"name": scheme}, "n_layers": 1000, "dim": 16, "n_heads": 2, "ffn_dim": 16}
    config, mesh = run_config("deep", model, train={"batch_tokens": 64}), Mesh()
    engine, data = build_engine(config, mesh), RankData(config, mesh)
    for step in (1, 2):
        engine.record(True)
        assert engine.forward_backward(data.rows(step)).isfinite()
        _, norms = engine.clip()
        signals = engine.signals()
        assert signals.shape == (1000, 2, 3)
        assert signals.isfinite().all() and norms.isfinite().all()
        engine.update(config.optim.lr)
    assert all(tensor.isfinite().all() for tensor in engine.pieces.tensors)
