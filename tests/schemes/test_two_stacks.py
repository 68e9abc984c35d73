"""Depth in two stacks: what docs/two-stacks.md shows of 500 layers each, at the 30 that a test can afford."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from copies import FLOOR, write
from two_stacks import CONFIG, update

from nlm.build import parse_config
from nlm.config import read_table
from nlm.data.tokenize import tokenize_languages
from nlm.statistics.store import read_layers
from nlm.train import train

N = 30
HEARD = FLOOR - 0.1
DEPTHS = [6, 12, 24, 48]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The document's, at a rate for fewer layers."""
    folder = tmp_path_factory.mktemp("copies")
    write(folder)
    for name in ("train", "validation"):
        text, out = str(folder / f"{name}.tsv"), str(folder / name)
        tokenize_languages([text], out, ["source", "copy"], str(folder / "tokenizer.json"), None)

    def run(scheme: str, n_layers: int) -> Path:
        keys = {
            "model.scheme.name": scheme,
            "model.n_layers": n_layers,
            "train.steps": 30,
            "optim.lr": 3e-3,
            "evaluate.every": 0,
            "checkpoint.every": 0,
            "log.every": 30,
            "data.train.path": folder / "train",
            "data.validation": folder / "validation",
            "log.dir": folder / f"{scheme}-{n_layers}",
        }
        return train(parse_config(read_table(CONFIG, [f"{key}={value}" for key, value in keys.items()])))

    return run


def validation_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"])


def test_deepnorm_hears_the_source_and_deep_post_ln_does_not(run: Callable[[str, int], Path]) -> None:
    deepnorm, post_ln = run("deepnorm", N), run("post_ln", N)
    assert validation_loss(deepnorm) < HEARD < FLOOR < validation_loss(post_ln)
    assert validation_loss(run("post_ln", 3)) < HEARD, "it fails where it is deep"
    even, vanishing = (read_layers(folder)["grad_norm/layer"][:, N:] for folder in (deepnorm, post_ln))
    assert even.shape == (2, N) and np.isfinite(even).all() and even[0, 0] > 0.5 * even[0, -1]
    assert vanishing[0, 0] < 1e-3 * vanishing[0, -1]


def test_a_small_step_moves_deepnorm_as_far_at_any_depth_and_post_ln_the_further_the_deeper() -> None:
    slopes = {
        scheme: float(np.polyfit(np.log(DEPTHS), np.log([update(scheme, n) for n in DEPTHS]), 1)[0])
        for scheme in ("deepnorm", "post_ln")
    }
    assert abs(slopes["deepnorm"]) < 0.2 and slopes["post_ln"] > 0.5, slopes
