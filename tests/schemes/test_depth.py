"""A thousand layers (2,000 sublayers) of every scheme, on real text."""

from collections.abc import Callable

import pytest
import torch

from nlm import SCHEMES
from nlm.build import build_engine
from nlm.config import Config
from nlm.data.rank import RankData
from nlm.mesh import Mesh
from nlm.statistics.forward import ForwardStatistics

RunConfig = Callable[..., Config]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_thousand_layers_stay_finite(scheme: str, run_config: RunConfig) -> None:
    model = {"scheme": {"name": scheme}, "n_layers": 1000, "dim": 16, "n_heads": 2, "ffn_dim": 16}
    config, mesh = run_config("deep", model, train={"batch_tokens": 64}), Mesh()
    engine, data = build_engine(config, mesh), RankData(config, mesh)
    recorded = ForwardStatistics(engine, queries=4)
    recorded.begin()
    assert engine.forward_backward(data.rows(1)).isfinite()
    _, norms = engine.clip()
    vectors = recorded.vectors()
    assert all(len(vector) == 1000 for vector in vectors.values())
    for name, vector in vectors.items():
        places = recorded.places.get(name.partition("/")[2])
        there = slice(None) if places is None else places < 2000
        assert vector[there].isfinite().all(), name
    assert norms.isfinite().all()
    engine.update(config.optim.lr)
    assert all(tensor.isfinite().all() for tensor in engine.pieces.tensors)
    with torch.no_grad():
        assert engine.loss(data.rows(2)).isfinite()
