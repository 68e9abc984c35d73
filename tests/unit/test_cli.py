"""The command line as a user meets it: exit codes, messages, and nothing made when the input is bad."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nlm import NORMS, SCHEMES, SCORES, WEIGHT_NORMS
from nlm.cli import main
from nlm.config import Config
from nlm.optim import OPTIMIZERS
from nlm.schemes.inits import INITS

RunConfig = Callable[..., Config]


@pytest.fixture
def config(run_config: RunConfig, shard: str, tmp_path: Path) -> Path:
    """A config file whose data is a copy of the shard, to be damaged."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(shard + suffix, tmp_path / f"copy{suffix}")
    path = tmp_path / "run.toml"
    path.write_text(run_config("run", data={"train": str(tmp_path / "copy")}).to_toml())
    return path


def test_the_installed_command_and_the_module_answer() -> None:
    script = Path(sys.executable).with_name("nlm")
    for command in ([script], [sys.executable, "-m", "nlm"]):
        shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
        assert all(verb in shown for verb in ("train", "tokenize", "report", "schemes"))


def test_train_and_report(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "train.steps=3"]) == 0
    shown = capsys.readouterr().out
    assert "step 3/3" in shown and "tokens/s" in shown and "ETA 0:00" in shown and "loss" in shown
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "pictures")]) == 0
    html, *pictures = map(Path, capsys.readouterr().out.splitlines())
    assert html == tmp_path / "pictures" / "report.html" and html.read_text().startswith("<!doctype html>")
    assert pictures[0] == tmp_path / "pictures" / "overview.png" and len(pictures) >= 11
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_schemes_are_listed_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes"]) == 0
    shown = capsys.readouterr().out
    for choices in (SCHEMES, NORMS, SCORES, WEIGHT_NORMS, INITS, OPTIMIZERS):
        assert all(f"\n  {name} " in shown for name in choices)
    assert "residual_init=True" in shown and "p=0.0625" in shown


def refused(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert main(["train", str(config), *overrides]) == 2
    assert not (config.parent / "run").exists(), "nothing is made for a bad config"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(line.startswith("nlm: ") for line in captured.err.splitlines())
    return captured.err


def test_a_bad_config_lists_every_problem(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = refused(config, capsys, "model.dims=3", "train.steps=many", "model.scheme.name=deepnrom")
    assert "model.dims: unknown key" in shown and "train.steps" in shown and "did you mean 'deepnorm'?" in shown
    assert len(shown.splitlines()) == 3


def test_a_vocabulary_smaller_than_the_data(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected more than 256, a token" in refused(config, capsys, "model.vocab_size=256")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_truncated_data(config: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = config.with_name(f"copy{suffix}")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert f"copy{suffix}" in refused(config, capsys)
    file.unlink()
    assert f"copy{suffix}: no such file" in refused(config, capsys)


def test_data_shorter_than_a_row(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = refused(config, capsys, "train.seq_len=1000000", "train.batch_tokens=1000000")
    assert "shorten train.seq_len or give a larger corpus" in shown


def test_text_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes("naïve".encode("latin-1"))
    assert main(["tokenize", str(bad), "--tokenizer", "byte", "--out", str(tmp_path / "out")]) == 2
    assert f"{bad}: not UTF-8 at byte 2" in capsys.readouterr().err


def test_a_changed_model_at_resume(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "train.steps=2"]) == 0
    capsys.readouterr()
    assert main(["train", str(config), "model.dim=64"]) == 2
    assert "model.dim: the run to resume has 32, the config 64" in capsys.readouterr().err


def test_a_run_that_diverges_exits_with_1(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "optim.lr=1e30", "optim.clip=0"]) == 1
    assert "lower optim.lr" in capsys.readouterr().err


def test_a_report_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["tokenize", "x", "--out", "y"]], ids=str)
def test_bad_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: nlm" in capsys.readouterr().err
