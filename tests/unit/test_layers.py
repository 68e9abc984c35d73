"""What is said of the layers of a model, against models that are built without them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nlm import load_checkpoint
from nlm.batch import KEPT, Batch
from nlm.build import build_model
from nlm.checkpoint import checkpoints
from nlm.cli import main
from nlm.config import Config
from nlm.data.masked import stand_ins
from nlm.evaluate.corpus import Corpus
from nlm.evaluate.depth_report import _batch
from nlm.evaluate.layers import centred_products, depth, similarity
from nlm.model import Transformer, weights
from nlm.random import row_keys
from nlm.schemes import SCHEMES
from nlm.train import train

MakeConfig = Callable[..., Config]
N_LAYERS = 3


def shaken(config: Config) -> Transformer:
    """No layer the same as another, nor any norm's gain 1."""
    model, generator = build_model(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter, _ in weights(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean())
    return model.eval()


def of_blocks(model: Transformer, kept: list[int], make: Callable[[int], Transformer]) -> Transformer:
    """As many layers as are kept, with their tensors, and the ends."""
    other, tensors = make(len(kept)), dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in (*other.named_parameters(), *other.named_buffers()):
            head, _, rest = name.removeprefix("blocks.").partition(".")
            tensor.copy_(tensors[f"blocks.{kept[int(head)]}.{rest}" if name.startswith("blocks.") else name])
    return other.eval()


def loss_of(model: Transformer, batch: Batch) -> float:
    with torch.no_grad():
        logits = model(batch.inputs)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(torch.randint(96, (4, 13), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("scheme", ["pre_ln", "post_ln", "deepnorm", "ngpt", "normformer"])
def test_a_layer_that_is_skipped_is_not_there(scheme: str, make_config: MakeConfig, batch: Batch) -> None:
    def make(n_layers: int) -> Transformer:
        return build_model(make_config({"scheme": {"name": scheme}, "n_layers": n_layers}))

    model = shaken(make_config({"scheme": {"name": scheme}, "n_layers": N_LAYERS}))
    before = loss_of(model, batch)
    found = depth(model, batch)
    assert found.loss == pytest.approx(before, rel=1e-5) and found.tokens == 48
    for l in range(N_LAYERS):
        shorter = of_blocks(model, [other for other in range(N_LAYERS) if other != l], make)
        assert found.skipped["layer"][l] == pytest.approx(loss_of(shorter, batch), rel=1e-5)
        first = of_blocks(model, list(range(l + 1)), make)
        assert found.lens[l + 1] == pytest.approx(loss_of(first, batch), rel=1e-5)
    assert len(set(found.skipped["layer"])) == N_LAYERS
    assert loss_of(model, batch) == before, "it is left as it was"


def test_a_sublayer_of_a_sum_that_is_skipped_gives_zero(make_config: MakeConfig, batch: Batch) -> None:
    config = make_config()
    model = shaken(config)
    found = depth(model, batch)
    for l in range(N_LAYERS):
        for name, matrix in (("attn", "attn.wo"), ("ffn", "ffn.w_down")):
            silent = shaken(config)
            with torch.no_grad():
                silent.get_parameter(f"blocks.{l}.{matrix}.weight").zero_()
            assert found.skipped[name][l] == pytest.approx(loss_of(silent, batch), rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, make_config: MakeConfig, batch: Batch) -> None:
    model = shaken(make_config({"scheme": {"name": scheme}}))
    found = depth(model, batch, every=2)
    assert found.tested.tolist() == [0, 2]
    assert found.lens[-1] == found.loss == pytest.approx(loss_of(model, batch), rel=1e-5)
    assert np.isfinite(found.skipped["layer"]).all() and np.isfinite(found.similarity).all()


def test_layers_that_do_nothing_are_found(make_config: MakeConfig, batch: Batch) -> None:
    model = shaken(make_config({"n_layers": 5}))
    with torch.no_grad():
        for l in (1, 3):
            model.get_parameter(f"blocks.{l}.attn.wo.weight").zero_()
            model.get_parameter(f"blocks.{l}.ffn.w_down.weight").zero_()
    found = depth(model, batch)
    assert found.idle == [1, 3] and found.loss_without_idle == pytest.approx(found.loss, rel=1e-6)
    assert found.similarity[1, 2] == pytest.approx(1) and found.rank[1] == pytest.approx(found.rank[2])
    everything = depth(model, batch, threshold=100.0)
    assert everything.idle == list(range(5))
    assert everything.loss_without_idle == pytest.approx(everything.lens[0], rel=1e-6)


def test_rank_and_similarity_of_streams(make_config: MakeConfig, batch: Batch) -> None:
    """Against singular values of numpy's, and the estimate written out (Song et al. 2012, eq. 5)."""
    model = shaken(make_config())
    streams: list[Tensor] = []
    for block in model.blocks.values():
        block.register_forward_hook(lambda block, inputs, outputs: streams.append(outputs[0]))
    model(batch.inputs)
    found = depth(shaken(make_config()), batch)
    for l, stream in enumerate(streams, 1):
        ranks = []
        for row in stream.detach().double().numpy():
            shares = np.linalg.svd(row, compute_uv=False)
            shares = shares[shares > 1e-12] / shares.sum()
            ranks.append(np.exp(-(shares * np.log(shares)).sum()))
        assert found.rank[l] == pytest.approx(np.mean(ranks), rel=1e-4)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        n, ones = len(a), np.ones(len(a))
        k, q = (x @ x.T * (1 - np.eye(n)) for x in (a, b))
        third = ones @ k @ ones * (ones @ q @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ k @ q @ ones)
        return (np.trace(k @ q) + third) / (n * (n - 3))

    a, b = (streams[i].detach().double().flatten(0, 1).numpy() for i in (0, 2))
    expected = hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5
    assert found.similarity[1, 3] == pytest.approx(expected, rel=1e-4) and expected < 0.999
    assert np.allclose(found.similarity, found.similarity.T) and np.allclose(np.diag(found.similarity), 1)


def test_independent_features_are_not_similar() -> None:
    """However many they are: that is what the unbiased estimate is for. The usual one gives 0.7 here."""
    generator = torch.Generator().manual_seed(0)
    a, b = (centred_products(torch.randn(100, 200, generator=generator)) for _ in range(2))
    assert abs(similarity(torch.stack([a, b]))[0, 1]) < 0.05


def test_the_verb(
    run_config: Callable[..., Config], shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(run_config("run", {"n_layers": 20}, data={"train": shard, "validation": shard}))
    checkpoint = checkpoints(run)[-1]
    capsys.readouterr()
    assert main(["layers", str(checkpoint), "--tokens", "70", "--every", "3"]) == 0
    shown = capsys.readouterr().out
    found: dict[str, Any] = json.loads((run / "evaluation" / "step-00000008-layers.json").read_text())
    assert found["tokens"] == 64 and found["tested"] == list(range(0, 20, 3))
    assert {len(found["skipped"][name]) for name in ("layer", "attn", "ffn")} == {7}
    assert f"loss {found['loss']:.4f} on 64 tokens" in shown
    assert f"{found['skipped']['layer'][3] - found['loss']:+.4f}" in shown
    assert (run / "evaluation" / "step-00000008-layers.png").read_bytes().startswith(b"\x89PNG")
    assert main(["layers", str(checkpoint), "--every", "0", "--threshold", "-1"]) == 2
    assert "--every: expected at least 1, got 0" in (said := capsys.readouterr().err) and "--threshold" in said
    (tmp_path / "short.txt").write_text("Exeunt.")
    assert main(["layers", str(checkpoint), "--data", str(tmp_path / "short.txt")]) == 2
    assert "no document has 33 tokens" in capsys.readouterr().err


def test_an_encoder_is_asked_for_what_is_hidden(
    run_config: Callable[..., Config], shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, encoder = {"train": shard, "validation": shard}, {"architecture": "encoder", "vocab_size": 258}
    checkpoint = checkpoints(train(run_config("run", encoder, data=data, train={"steps": 2})))[-1]
    model, config = load_checkpoint(checkpoint)
    batch = _batch(Corpus([shard], config), config, 32, 5)
    assert 0.05 < float(batch.n_targets()) / 160 < 0.3 and (batch.inputs == 257).any()
    assert main(["layers", str(checkpoint), "--tokens", "160", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == int(batch.n_targets())
    assert found["loss"] == pytest.approx(loss_of(model.eval(), batch), rel=1e-5)
    assert len(set(found["lens"])) == N_LAYERS + 1
    (tmp_path / "short.txt").write_text("Exeunt. " * 3)
    assert main(["layers", str(checkpoint), "--data", str(tmp_path / "short.txt")]) == 2
    assert "no document has 32 tokens" in capsys.readouterr().err
    (tmp_path / "enough.txt").write_text("Exeunt.")
    how = ["--data", str(tmp_path / "enough.txt"), "--window", "4", "--tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlm.evaluate.masked.SEED", hides_nothing(config, 4))
        assert main(["layers", str(checkpoint), *how]) == 2
    assert "--tokens: none of the 4 is masked; give more" in capsys.readouterr().err


def hides_nothing(config: Config, window: int) -> int:
    """A seed by which the first window has no token to find."""
    row = torch.zeros(1, window + 1, dtype=torch.int64)
    for seed in range(100):
        read = stand_ins(row, row_keys(seed, torch.tensor([0])), config.model.vocab_size, config.train.masked_share)
        if (read[0, :window] == KEPT).all():
            return seed
    raise AssertionError("each of 100 seeds hides some")
