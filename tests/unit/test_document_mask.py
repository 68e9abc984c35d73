"""Documents packed into one row know nothing of each other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from entries import MIXED
from torch import Tensor
from torch.nn.functional import cross_entropy

from nlm import build_model
from nlm.anatomy import IGNORED
from nlm.batch import Batch
from nlm.build import build_engine
from nlm.config import Config
from nlm.data.corpus import Corpus
from nlm.data.tokenize import tokenize
from nlm.mesh import Mesh
from nlm.model import Transformer
from nlm.train import train

MakeConfig = Callable[..., Config]


def packed() -> Batch:
    """[2 13]: three documents in one row, two in the other."""
    tokens = torch.randint(96, (2, 13), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(2, 13, dtype=torch.int64)
    documents[0, 5:], documents[0, 9:], documents[1, 7:] = 1, 2, 1
    return Batch(tokens, documents)


def losses(model: Transformer, batch: Batch) -> Tensor:
    """[B S]; 0 where nothing is to be predicted."""
    logits = model(batch.inputs, segments=batch.segments)
    return cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", ignore_index=IGNORED)


@pytest.mark.parametrize("keys", MIXED.values(), ids=MIXED.keys())
def test_a_change_in_one_document_leaves_the_others_losses(keys: dict[str, Any], make_config: MakeConfig) -> None:
    """Of models with every score, whose parameters have been moved: some schemes start with nothing to see."""
    model, batch = build_model(make_config(keys)), packed()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    before = losses(model, batch)
    for row, position in (0, 2), (0, 6), (0, 11), (1, 0), (1, 8):
        tokens = batch.tokens.clone()
        tokens[row, position] = (tokens[row, position] + 1) % 96
        changed = losses(model, Batch(tokens, batch.documents)) != before
        own = batch.documents == batch.documents[row, position]
        own[1 - row] = False
        assert changed[row].any()
        assert not (changed & ~own[:, :-1]).any()


def test_a_document_in_a_row_is_the_document_alone(make_config: MakeConfig) -> None:
    """Where positions are relative; its first token has no predecessor in either."""
    model, batch = build_model(make_config()), packed()
    alone = model(batch.tokens[:1, 5:9])
    torch.testing.assert_close(model(batch.inputs, segments=batch.segments)[:1, 5:9], alone)


def test_targets_are_the_next_tokens_of_the_same_document() -> None:
    batch = packed()
    ignored = batch.targets == IGNORED
    assert ignored.nonzero().tolist() == [[0, 4], [0, 8], [1, 6]]
    assert (batch.targets == batch.tokens[:, 1:])[~ignored].all()
    assert batch.n_targets() == 21
    assert [len(part) for part in batch.chunk(2)] == [1, 1]
    assert sum(part.n_targets() for part in batch.chunk(2)) == 21


def test_the_loss_is_the_mean_over_what_is_to_be_predicted(run_config: MakeConfig) -> None:
    config = run_config("masked", data={"document_mask": True}, train={"precision": "fp64"})
    engine = build_engine(config, Mesh())
    found = Corpus(config).batch(1)
    starts = torch.from_numpy(found.starts)
    starts[0, 5] = starts[1, 9] = starts[1, 20] = starts[3, 32] = True
    batch = Batch(torch.from_numpy(found.tokens), starts.cumsum(1))
    with torch.no_grad():
        expected = losses(engine.models[0], batch).sum() / (4 * 32 - 4)
    assert engine.forward_backward(batch).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("parallel", [{"microbatches": 4}, {"compile": True, "recompute": "block"}], ids=str)
def test_how_a_step_is_computed_does_not_change_it(
    parallel: dict[str, Any], plays: list[Path], tmp_path: Path, run_config: MakeConfig
) -> None:
    """Speeches shorter than a row, so that most rows hold several; their losses are not those without a mask."""
    torch.compiler.reset()
    speeches = plays[0].read_text("utf-8").split("\n\n")
    (tmp_path / "play.jsonl").write_text("".join(json.dumps({"text": speech}) + "\n" for speech in speeches))
    tokenize([str(tmp_path / "play.jsonl")], str(tmp_path / "play"), "byte", None)
    masked = {"train": str(tmp_path / "play"), "document_mask": True}
    plain = losses_of(train(run_config("plain", data=masked)))
    assert losses_of(train(run_config("other", data=masked, parallel=parallel))) == pytest.approx(plain, rel=1e-5)
    unmasked = losses_of(train(run_config("unmasked", data=masked | {"document_mask": False})))
    assert unmasked != pytest.approx(plain, rel=1e-3)


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
