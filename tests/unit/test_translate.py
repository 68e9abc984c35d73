"""Translating with a trained encoder–decoder: the cache, the search, the verbs, and the scores on the way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nlm import SCHEMES, SCORES, build_model, load_checkpoint
from nlm.checkpoint import checkpoints
from nlm.cli import main
from nlm.config import Config, ConfigError
from nlm.data import load_tokenizer
from nlm.data.tokenize import tokenize_languages
from nlm.decode.generate import CachedDecoder
from nlm.decode.search import Beams
from nlm.decode.translate import Translator
from nlm.train import train

pytest.importorskip("sacrebleu", reason="needs sacreBLEU, of the extra `translation`")

MakeConfig = Callable[..., Config]
TWO = {"architecture": "encoder_decoder", "n_layers": 2, "n_encoder_layers": 1, "n_kv_heads": 2}
FIELDS = {"ngpt": {"alpha": 0.05}, "layerscale": {"gamma": 0.1}}
LACKING = {"brainformer", "branch_scaled", "layernorm_scaling"}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"scheme": {"name": name} | FIELDS.get(name, {})} for name in SCHEMES if name not in LACKING},
    **{name: {"attention": {"score": name}} for name in SCORES},
    **{name: {"position": name} for name in ("learned", "sinusoidal", "rope_interleaved", "none")},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_training_forward(name: str, make_config: MakeConfig) -> None:
    """Sources and targets of several lengths in one batch, rows that change places on the way."""
    model = build_model(make_config(TWO | MODELS[name], train={"source_len": 9})).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.3 * (parameter.abs().mean() + 0.1) * torch.randn(parameter.shape, generator=generator)
    padding = model.config.padding
    sources, targets = (torch.randint(padding, (4, n), generator=generator) for n in (9, 12))
    lengths = [9, 5, 1, 7]
    for row, length in enumerate(lengths):
        sources[row, length:] = padding
    expected = model(targets, sources)
    decoder = CachedDecoder(model, sources=[row[:n].tolist() for row, n in zip(sources, lengths, strict=True)])
    rows, starts = [0, 1, 2, 3], [2, 4, 1, 3]
    found = decoder.start([targets[row, : starts[row]].tolist() for row in rows])
    for step in range(8):
        here = expected[rows, [starts[row] + step - 1 for row in rows]]
        assert (found - here).abs().max() < 1e-5 * expected.abs().max()
        if step == 4:
            rows = [3, 0, 1]
            decoder.select(rows)
        found = decoder.step([int(targets[row, starts[row] + step]) for row in rows])


LANGUAGES = ["de", "en", "it"]
TEXTS = [
    ("Die Tür ist offen.", "The door is open.", "La porta è aperta."),
    ("Wir warten auf den Zug.", "We wait for the train.", "Aspettiamo il treno."),
    ("Brot und Salz", "Bread and salt", "Pane e sale"),
    ("Niemand kam an die Tür.", "No one came to the door.", "Nessuno venne alla porta."),
    ("Der Zug fährt um neun.", "The train leaves at nine.", "Il treno parte alle nove."),
    ("Es regnet in der Stadt.", "It is raining in the town.", "Piove nella città."),
]


@pytest.fixture(scope="module")
def trained(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned six sentences by heart, between any two of three languages."""
    folder = tmp_path_factory.mktemp("translator")
    records = [dict(zip(LANGUAGES, texts, strict=True)) for texts in TEXTS]
    (folder / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tokenize_languages([str(folder / "texts.jsonl")], str(folder / "texts"), LANGUAGES, None, 340)
    pairs = {"path": str(folder / "texts"), "languages": LANGUAGES}
    config = make_config(
        {
            "architecture": "encoder_decoder",
            "vocab_size": 341,
            "dim": 64,
            "n_layers": 2,
            "scheme": {"name": "deepnorm"},
        },
        train={"steps": 120, "batch_tokens": 1600, "seq_len": 40, "label_smoothing": 0.1},
        optim={"lr": 4e-3, "warmup_steps": 10},
        data={"train": pairs, "validation": pairs["path"]},
        evaluate={"every": 20, "translations": 4},
        log={"dir": str(folder / "run"), "tensorboard": False, "every": 60},
        statistics={"enabled": False},
    )
    return train(config)


def test_what_was_learned_is_translated(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    last = checkpoints(trained)[-1]
    model, config = load_checkpoint(last)
    coder = load_tokenizer(str(trained.parent / "texts.model"))
    translator = Translator(model, coder, config.source_len, Beams(2, 0.6), batch=4)
    for i, source in enumerate(LANGUAGES):
        for j, target in enumerate(LANGUAGES):
            if i != j:
                found = translator.texts([texts[i] for texts in TEXTS], target)
                right = sum(text == texts[j] for text, texts in zip(found, TEXTS, strict=True))
                assert right >= 5, (source, target, found)
    assert main(["translate", str(last), "--to", "en", TEXTS[0][0], TEXTS[2][2]]) == 0
    assert capsys.readouterr().out.splitlines() == translator.texts([TEXTS[0][0], TEXTS[2][2]], "en")
    (tmp_path / "texts.txt").write_text("Brot und Salz\n", encoding="utf-8")
    assert main(["translate", str(last), "--to", "it", "--file", str(tmp_path / "texts.txt")]) == 0
    assert capsys.readouterr().out == "Pane e sale\n"
    assert main(["translate", str(last), "Brot", "--to", "fr"]) == 2
    assert "--to: expected a language of the training, got 'fr'" in capsys.readouterr().err


def test_scores_in_the_loop_and_afterwards(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if "bleu" in line)
    directions = [f"{a}-{b}" for a in LANGUAGES for b in LANGUAGES if a != b]
    assert last["bleu"] > 60 and last["bleu"] > first["bleu"] and last["chrf"] > 60
    assert last["bleu"] == pytest.approx(sum(last[f"bleu/{name}"] for name in directions) / 6)
    assert main(["evaluate", str(checkpoints(trained)[-1]), "--limit", "4"]) == 0
    assert "| mean of 6 | 24 |" in capsys.readouterr().out
    (file,) = (trained / "evaluation").glob("*.json")
    (found,) = json.loads(file.read_text())["translation"].values()
    assert {name: found[name]["bleu"] for name in directions} == pytest.approx(
        {name: last[f"bleu/{name}"] for name in directions}
    )
    assert all(found[name]["copy_bleu"] < 10 for name in directions)


def test_what_does_not_translate(make_config: MakeConfig, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.translations: are of pairs to translate"):
        make_config(evaluate={"translations": 4})
    pairs = {"train": {"path": "x", "languages": LANGUAGES}}
    with pytest.raises(ConfigError, match=r"evaluate\.translations: needs a whole model on a rank"):
        make_config(TWO, data=pairs, evaluate={"translations": 4}, parallel={"tp": 2})
    last = str(checkpoints(trained)[-1])
    assert main(["evaluate", last, "--window", "8"]) == 2
    assert "are not of an encoder_decoder" in capsys.readouterr().err
    assert main(["generate", last, "Brot"]) == 2
    assert "got an encoder_decoder, which translates" in capsys.readouterr().err
