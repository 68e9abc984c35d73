"""What is said of a checkpoint on text, against the same thing computed token by token."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nlm import load_checkpoint
from nlm.checkpoint import checkpoints
from nlm.cli import main
from nlm.config import Config, ConfigError
from nlm.data import TokenShard
from nlm.data.tokenize import tokenize
from nlm.evaluate.corpus import Corpus
from nlm.evaluate.load import Loader, evaluation_config
from nlm.evaluate.run import following
from nlm.evaluate.text import BINS, measure, reading
from nlm.evaluate.windows import batches, rows, spans
from nlm.mesh import Mesh
from nlm.train import train

RunConfig = Callable[..., Config]


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_every_token_is_predicted_once_with_enough_context(n: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    predicted = Counter[int]()
    for start, stop, first in spans(n, window, stride):
        assert start >= 0 and 2 <= stop - start <= window + 1
        for target in range(first, stop):
            predicted[target] += 1
            assert target - start >= min(target, window - stride + 1)
    assert predicted == Counter(range(1, n))


@given(st.lists(st.integers(2, 40), max_size=12), st.integers(1, 5), st.integers(1, 3))
def test_batches_lose_nothing(lengths: list[int], size: int, multiple: int) -> None:
    documents = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    found = [row for document in documents for row in rows(document, 9, 4)]
    scored: list[int] = []
    for batch in batches(found, size, multiple):
        assert batch.real is not None and batch.scored is not None
        assert len(batch) == size and batch.inputs.shape[1] % multiple == 0
        assert not (batch.scored & ~batch.real).any()
        assert torch.equal(batch.targets[batch.real], batch.inputs[batch.real] + 1)
        assert (batch.targets[~batch.real] == -100).all()
        scored += batch.targets[batch.scored].tolist()
    assert sorted(scored) == [token for document in documents for token in document[1:]]


@pytest.fixture
def run(run_config: RunConfig) -> Callable[..., Path]:
    def make(name: str = "run", model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Path:
        quick = {"train": {"steps": 12}, "optim": {"lr": 1e-2}, "statistics": {"enabled": False}}
        return train(run_config(name, model, **(quick | sections)))

    return make


def measured(checkpoint: Path, data: list[str], *how: int) -> dict[str, Any]:
    config = evaluation_config(checkpoint)
    corpus = Corpus(data, config)
    return measure(Loader(Mesh()).load(checkpoint, config), corpus, reading(config, *how))


def one_by_one(checkpoint: Path, document: np.ndarray, window: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each token but the first, ln p of all tokens, and which it is."""
    model, _ = load_checkpoint(checkpoint)
    found, targets, n = [], [], len(document)
    for target in range(1, n):
        number = max(0, math.ceil((target - window) / stride))
        start = min(number * stride, max(0, n - window - 1))
        with torch.no_grad():
            logits = model(torch.from_numpy(document[start:target].astype(np.int64))[None])[0, -1]
        found.append(logits.double().log_softmax(0).numpy())
        targets.append(document[target])
    return np.stack(found), np.array(targets)


@pytest.mark.parametrize("mask", [False, True])
def test_against_one_token_at_a_time(mask: bool, run: Callable[..., Path], shard: str) -> None:
    checkpoint = checkpoints(run(data={"train": shard, "document_mask": mask}))[-1]
    found = measured(checkpoint, [shard], 20, 6, 150)
    tokens = np.array(TokenShard(shard).document(0)[: 150 + mask])
    document = tokens if mask else np.concatenate([[256], tokens])
    log_p, targets = one_by_one(checkpoint, document, 20, 6)
    n = len(targets)
    loss, confidence = -log_p[np.arange(n), targets], np.exp(log_p.max(1))
    correct = log_p.argmax(1) == targets
    assert (found["tokens"], found["bytes"], found["documents"]) == (150, 150, 1)
    assert found["loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss.mean()), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss.sum() / math.log(2) / 150, rel=1e-5)
    assert found["accuracy"] == pytest.approx(correct.mean())
    error = 0.0
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    for i in np.unique(bins):
        inside = bins == i
        error += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert found["calibration_error"] == pytest.approx(error, rel=1e-4)
    assert sum(b["tokens"] for b in found["reliability"]) == 150 and len(found["reliability"]) == len(set(bins))


def test_loss_by_position_is_that_of_all_windows(run: Callable[..., Path], shard: str) -> None:
    """With a context of k tokens it is that of a model that sees no more than k: windows of k, each token once."""
    checkpoint = checkpoints(run())[-1]
    by_position = measured(checkpoint, [shard], 4, 4, 400)["by_position"]
    assert [(b["from"], b["to"], b["tokens"]) for b in by_position] == [(i, i, 100) for i in (1, 2, 3, 4)]
    document = np.concatenate([[256], TokenShard(shard).document(0)[:400]])
    model, _ = load_checkpoint(checkpoint)
    windows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(document, 5)[::4].astype(np.int64))
    with torch.no_grad():
        log_p = model(windows[:, :-1]).log_softmax(-1)
    expected = -log_p.gather(2, windows[:, 1:, None])[..., 0].mean(0)
    assert [b["loss"] for b in by_position] == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_same_text_in_any_form(run: Callable[..., Path], plays: list[Path], tmp_path: Path) -> None:
    """Also that of other tokens: their bits per byte are of the same bytes."""
    texts = [play.read_text()[:700] + " é🎉" for play in plays[:2]]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "both.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    files = [str(tmp_path / f"{i}.txt") for i in range(2)]
    tokenize(files, str(tmp_path / "both"), "byte", None)
    checkpoint = checkpoints(run())[-1]
    found = measured(checkpoint, files)
    assert found == measured(checkpoint, [str(tmp_path / "both")])
    config = evaluation_config(checkpoint)
    corpus = Corpus([str(tmp_path / "both.jsonl")], config, text_field="body")
    assert found == measure(Loader(Mesh()).load(checkpoint, config), corpus, reading(config))
    n_bytes = sum(len(text.encode()) for text in texts)
    assert (found["bytes"], found["documents"], found["tokens"]) == (n_bytes, 2, n_bytes + 2)

    tokenize(files, str(tmp_path / "words"), None, 340)
    data = {"train": str(tmp_path / "words"), "validation": str(tmp_path / "words")}
    words = run("words", {"vocab_size": 340}, data=data)
    found = measured(checkpoints(words)[-1], files)
    assert found["bytes"] == n_bytes and found["tokens"] < n_bytes
    assert found == measured(checkpoints(words)[-1], [str(tmp_path / "words")])
    last = json.loads((words / "metrics.jsonl").read_text().splitlines()[-1])
    per_token = n_bytes / TokenShard(tmp_path / "words").n_tokens
    assert last["validation_perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    assert last["validation_bits_per_byte"] == pytest.approx(last["validation_loss"] / math.log(2) / per_token)


def test_the_loop_says_the_same(run: Callable[..., Path], plays: list[Path], tmp_path: Path) -> None:
    """Of one document in rows that follow one another."""
    (tmp_path / "one.txt").write_text(plays[0].read_text()[: 10 * 32])
    tokenize([str(tmp_path / "one.txt")], str(tmp_path / "one"), "byte", None)
    path = str(tmp_path / "one")
    folder = run(data={"train": path, "validation": path, "document_mask": True})
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    n = TokenShard(path).n_tokens - 1
    found = measured(checkpoints(folder)[-1], [path], 32, 32)
    assert n % 32 == 0 and found["tokens"] == n
    assert last["validation_loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_a_run_and_what_is_kept_of_it(
    run: Callable[..., Path], shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": shard, "validation": shard}
    folder = run(data=data, checkpoint={"every": 4, "keep_last": 3}, evaluate={"batches": 1})
    text = tmp_path / "ham.txt"
    text.write_text("To be, or not to be, that is the question:\n" * 9)
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--tokens", "300", "--rows", "3"]) == 0
    shown = capsys.readouterr().out
    assert [shown.count(f"step {step} ") for step in (4, 8, 12)] == [1, 1, 1]
    kept = [json.loads((folder / "evaluation" / f"step-{step:08d}.json").read_text()) for step in (4, 8, 12)]
    losses = [found["text"][shard]["loss"] for found in kept]
    assert losses == sorted(losses, reverse=True) and [found["step"] for found in kept] == [4, 8, 12]
    assert all(f"{loss:.4f}" in shown for loss in losses)
    assert (folder / "evaluation" / "plays.png").read_bytes().startswith(b"\x89PNG")

    last = str(checkpoints(folder)[-1])
    assert main(["evaluate", last, "train.precision=bf16", "--data", str(text)]) == 0
    both = json.loads((folder / "evaluation" / "step-00000012.json").read_text())["text"]
    assert both.keys() == {shard, str(text)} and both[shard] == kept[2]["text"][shard]
    assert main(["evaluate", last, "--data", str(text), "--json", str(tmp_path / "out.json")]) == 0
    (alone,) = json.loads((tmp_path / "out.json").read_text())
    assert alone["text"].keys() == {str(text)} and (tmp_path / "out.png").exists()
    exact, rounded = alone["text"][str(text)]["loss"], both[str(text)]["loss"]
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact


def test_it_follows_a_run_to_its_end(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlm.evaluate.run.POLL_S", 0.0)
    folder = run(checkpoint={"every": 4, "keep_last": 3})
    last = checkpoints(folder)[-1]
    away = last.rename(tmp_path / "away")
    found = following(folder)
    assert [next(found).name for _ in range(2)] == ["step-00000004", "step-00000008"]
    away.rename(last)
    assert [checkpoint.name for checkpoint in found] == ["step-00000012"]


def test_what_does_not_fit(run: Callable[..., Path], shard: str, plays: list[Path], tmp_path: Path) -> None:
    checkpoint = checkpoints(run("run", {"vocab_size": 400}))[-1]
    config = evaluation_config(checkpoint)
    for key in ("model.dim=64", "parallel.pp=2", "parallel.microbatches=2", "train.seq_len=64"):
        with pytest.raises(ConfigError, match=f"{key.partition('=')[0]}: not for evaluation"):
            evaluation_config(checkpoint, [key])
    with pytest.raises(ConfigError, match=r"--window: expected 1 to train\.seq_len = 32"):
        reading(config, 33)
    with pytest.raises(ConfigError, match="--stride: expected 1 to the window's 8"):
        reading(config, 8, 9)
    with pytest.raises(ValueError, match="no such file or directory"):
        Corpus([str(tmp_path / "none.txt")], config)
    tokenize([str(plays[0])], str(tmp_path / "words"), None, 340)
    with pytest.raises(ValueError, match=r"expected tokens of the model's tokenizer, got those of words\.model"):
        Corpus([str(tmp_path / "words")], config)
    with pytest.raises(ValueError, match="--tokenizer: expected the one that the data were made with"):
        Corpus([shard], config, str(tmp_path / "words.model"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt: no token to predict"):
        measured(checkpoint, [str(tmp_path / "empty.txt")])
