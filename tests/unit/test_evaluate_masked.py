"""What is said of an encoder on text, against the same thing computed window by window without padding."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlm import load_checkpoint
from nlm.batch import Batch
from nlm.checkpoint import checkpoints
from nlm.cli import main
from nlm.config import Config, ConfigError
from nlm.data.masked import stand_ins
from nlm.data.tokenize import tokenize
from nlm.evaluate.corpus import Corpus
from nlm.evaluate.load import Loader, evaluation_config
from nlm.evaluate.masked import SEED
from nlm.evaluate.text import BINS, measure, reading
from nlm.mesh import Mesh
from nlm.random import mixed
from nlm.train import train

ENCODER = {"architecture": "encoder", "vocab_size": 258}
RunConfig = Callable[..., Config]
WINDOW = 20


@pytest.fixture
def run(run_config: RunConfig) -> Callable[..., Path]:
    def make(name: str = "run", model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Path:
        quick = {"train": {"steps": 12}, "optim": {"lr": 1e-2}, "statistics": {"enabled": False}}
        for section, values in sections.items():
            quick[section] = quick.get(section, {}) | values
        return train(run_config(name, ENCODER | (model or {}), **quick))

    return make


@pytest.fixture
def texts(plays: list[Path], tmp_path: Path) -> list[str]:
    """Three: of many windows, of one, and of less than one."""
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file, play, n in zip(files, plays, (700, WINDOW - 1, 7), strict=False):
        file.write_text(play.read_text()[:n])
    return [str(file) for file in files]


def measured(checkpoint: Path, data: list[str], *how: int | None, rows: int | None = None) -> dict[str, Any]:
    config = evaluation_config(checkpoint, rows=rows)
    return measure(Loader(Mesh()).load(checkpoint, config), Corpus(data, config), reading(config, *how))


def window_by_window(checkpoint: Path, texts: list[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each hidden token, ln p of all tokens, and which it is."""
    model, config = load_checkpoint(checkpoint)
    model.eval()
    found, targets, number = [], [], 0
    for text in texts:
        document = torch.tensor([*Path(text).read_bytes(), 256])
        for begins in range(0, len(document), WINDOW):
            start = max(0, min(begins, len(document) - WINDOW))
            row = document[start : start + WINDOW]
            filled = torch.cat([row, torch.zeros(WINDOW + 1 - len(row), dtype=torch.int64)])[None]
            key = mixed(number + mixed(torch.tensor(SEED)))[None]
            batch = Batch(filled, stand_ins=stand_ins(filled, key, config.model.vocab_size, share))
            with torch.no_grad():
                log_p = model(batch.inputs[:, : len(row)])[0].double().log_softmax(-1)
            for place in range(begins - start, len(row)):
                if batch.targets[0, place] >= 0:
                    found.append(log_p[place].numpy())
                    targets.append(int(row[place]))
            number += 1
    return np.stack(found), np.array(targets)


@pytest.mark.parametrize(("mask", "share"), [(False, 0.15), (True, 0.4)])
def test_against_one_window_at_a_time(mask: bool, share: float, run: Callable[..., Path], texts: list[str]) -> None:
    checkpoint = checkpoints(run(train={"masked_share": share}, data={"document_mask": mask}))[-1]
    log_p, targets = window_by_window(checkpoint, texts, share)
    loss, confidence = -log_p[np.arange(len(targets)), targets], np.exp(log_p.max(1))
    correct = log_p.argmax(1) == targets
    found = measured(checkpoint, texts, WINDOW)
    n = sum(len(Path(text).read_bytes()) + 1 for text in texts)
    assert (found["tokens"], found["of_tokens"], found["documents"]) == (len(targets), n, 3)
    assert len(targets) / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    assert found["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss.mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(correct.mean())
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    error = sum(abs((confidence - correct)[bins == i].sum()) for i in np.unique(bins)) / len(targets)
    assert found["calibration_error"] == pytest.approx(error, rel=1e-4)
    assert sum(b["tokens"] for b in found["reliability"]) == len(targets)
    assert not {"bits_per_byte", "bytes", "by_position"} & found.keys()


def test_neither_batches_nor_the_form_of_the_data_nor_the_run_s_seed_count(
    run: Callable[..., Path], texts: list[str], tmp_path: Path
) -> None:
    checkpoint = checkpoints(run())[-1]
    found = measured(checkpoint, texts, WINDOW, rows=1)
    for rows in (3, 50):
        other = measured(checkpoint, texts, WINDOW, rows=rows)
        assert other["tokens"] == found["tokens"] and other["loss"] == pytest.approx(found["loss"], rel=1e-6)
    tokenize(texts, str(tmp_path / "all"), "byte", None)
    assert measured(checkpoint, [str(tmp_path / "all")], WINDOW, rows=1) == found
    first = measured(checkpoint, texts, WINDOW, None, 400)
    assert first == measured(checkpoint, texts[:1], WINDOW, None, 400), "the first of them, however many follow"
    assert first["of_tokens"] == 400 and first["tokens"] < found["tokens"]
    text = (checkpoint / "config.toml").read_text()
    (checkpoint / "config.toml").write_text(text.replace("seed = 0", "seed = 7"))
    assert "seed = 0" in text and measured(checkpoint, texts, WINDOW, rows=1) == found


def test_the_loop_says_the_same(run: Callable[..., Path], plays: list[Path], tmp_path: Path) -> None:
    """Of one document in rows that follow one another, where the run's seed is the one of here."""
    (tmp_path / "one.txt").write_text(plays[0].read_text()[: 10 * 32])
    tokenize([str(tmp_path / "one.txt")], path := str(tmp_path / "one"), "byte", None)
    folder = run(train={"seed": SEED}, data={"train": path, "validation": path})
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found = measured(checkpoints(folder)[-1], [path], 32, None, 320)
    for name in ("loss", "perplexity", "accuracy"):
        assert last[f"validation_{name}"] == pytest.approx(found[name], rel=1e-6)


def test_a_run_and_what_is_kept_of_it(
    run: Callable[..., Path], shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(data={"train": shard, "validation": shard}, checkpoint={"every": 4, "keep_last": 3})
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--tokens", "900", "--follow"]) == 0
    shown = capsys.readouterr().out
    kept = [json.loads((folder / "evaluation" / f"step-{step:08d}.json").read_text()) for step in (4, 8, 12)]
    for found in (result["text"][shard] for result in kept):
        numbers = f"{found['loss']:.4f} {found['perplexity']:.2f} - {found['accuracy']:.4f}"
        assert numbers in " ".join(shown.split()) and found["of_tokens"] == 900
    assert (folder / "evaluation" / "plays.png").read_bytes().startswith(b"\x89PNG")

    last = str(checkpoints(folder)[-1])
    for asked, said in (
        (["--stride", "4"], "--stride: an encoder's windows do not overlap, got 4"),
        (["--tasks", "any"], "--tasks: expected model.architecture = 'decoder'"),
    ):
        assert main(["evaluate", last, *asked]) == 2
        assert said in capsys.readouterr().err
    config = evaluation_config(Path(last))
    translator = config.model.model_copy(update={"architecture": "encoder_decoder"})
    with pytest.raises(ConfigError, match=r"expected model\.architecture = 'decoder'.*got 'encoder_decoder'"):
        reading(config.model_copy(update={"model": translator}))
    (tmp_path / "none.txt").write_text("I")
    assert main(["evaluate", last, "--data", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no token to predict; give more text" in capsys.readouterr().err
