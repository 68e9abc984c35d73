"""Two runs compared: what is the same is, and every single difference is found and placed."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nlm.checkpoint import checkpoints
from nlm.cli import main
from nlm.compare import by_norm, by_number, differences
from nlm.config import Config
from nlm.storage import Rectangle, read_all, write
from nlm.train import train

RunConfig = Callable[..., Config]


@pytest.fixture
def runs(run_config: RunConfig) -> tuple[Path, Path]:
    return train(run_config("one")), train(run_config("other"))


def change_metric(run: Path, step: int, key: str, value: float) -> None:
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[step - 1][key] = value
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_tensor(run: Path, name: str) -> None:
    """One number of it, by a thousandth of the tensor's norm."""
    folder = checkpoints(run)[-1] / "tensors"
    tensors = read_all(folder)
    tensors[name].view(-1)[3] += 1e-3 * tensors[name].norm()
    for file in folder.iterdir():
        file.unlink()
    write(folder, [Rectangle(name, t.shape, (0,) * t.dim(), t) for name, t in tensors.items()], None)


def test_two_runs_of_a_config_are_the_same(runs: tuple[Path, Path]) -> None:
    found = differences(*runs)
    assert {"batch_digest", "loss", "grad_norm", "parameters", "optimizer", "layers/grad_norm/layer"} < found.keys()
    assert all(difference.first is None and difference.size == 0 for difference in found.values())


def test_every_difference_is_found_and_placed(runs: tuple[Path, Path]) -> None:
    run, reference = runs
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[3])["loss"]
    change_metric(run, 4, "loss", loss * (1 + 1e-9))
    change_metric(run, 6, "batch_digest", 7)
    change_tensor(run, "blocks.1.attn.wq.weight")
    change_tensor(run, "head.weight.exp_avg")
    found = differences(run, reference)
    assert found["loss"].first == "step 4" and found["loss"].size == pytest.approx(1e-9, rel=1e-3)
    assert found["batch_digest"].first == "step 6" and found["batch_digest"].size == math.inf
    assert found["parameters"].first == "blocks.1.attn.wq.weight"
    assert found["parameters"].size == pytest.approx(1e-3, rel=1e-2)
    assert found["optimizer"].first == "head.weight.exp_avg"
    assert found["grad_norm"].first is None


def test_other_steps_are_no_comparison(runs: tuple[Path, Path], run_config: RunConfig) -> None:
    longer = train(run_config("longer", train={"steps": 9}))
    with pytest.raises(ValueError, match=r"expected the steps of the other run; missing are \[\], not expected \[9\]"):
        differences(longer, runs[1])


def test_numbers_that_are_not_finite_must_be_equal() -> None:
    nan, inf = math.nan, math.inf
    assert by_number([nan, inf, 0], [nan, inf, 0]) == 0 == by_norm([nan, inf], [nan, inf])
    for a, b in (([nan], [1.0]), ([1.0], [nan]), ([inf], [1.0]), ([1.0], [0.0])):
        assert by_number(a, b) == inf and by_norm(a, b) == inf, (a, b)
    assert by_number([1.0, 2.002], [1.0, 2.0]) == pytest.approx(1e-3)
    assert by_norm(np.array([3.0, 4.0]), np.array([3.0, 4.05])) == pytest.approx(0.05 / np.hypot(3, 4.05))


@pytest.fixture
def config(run_config: RunConfig, tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(run_config("run").to_toml())
    return str(path)


def test_prove_resume_in_the_same_layout(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove-resume", config, "--at", "3", "optim.lr=2e-3"]) == 0
    said = capsys.readouterr().out
    assert "interrupted after step 3 of 8, then as before" in said and said.endswith("proved\n")
    kinds = ["data", "loss", "gradient norm", "statistics", "parameters", "optimizer"]
    assert all(f"  {kind:14}bit-identical" in said for kind in kinds)
    proof = tmp_path / "run" / "prove-resume"
    assert [path.name for path in checkpoints(proof / "interrupted")] == ["step-00000003", "step-00000008"]
    assert "lr = 0.002" in (proof / "straight" / "config.toml").read_text()


@pytest.mark.parametrize("layout", ["tp=2", "dp_shard=2,engine=deepspeed,zero=2"])
def test_prove_resume_in_another_layout(layout: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove-resume", config, f"--layout-after={layout}"]) == 0
    said = capsys.readouterr().out
    assert f"interrupted after step 4 of 8, then with {layout}" in said
    assert f"  {'data':14}bit-identical" in said and f"  {'parameters':14}differs by up to" in said


@pytest.mark.parametrize("layout", [[], ["--layout-after=microbatches=2"]], ids=str)
def test_a_resume_that_is_wrong_is_not_proved(
    layout: list[str], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here with another learning rate after the interruption."""
    from nlm import prove

    train_apart = prove._train

    def wrong(path: str, overrides: list[str], ranks: int) -> None:
        resumes = any("interrupted" in word for word in overrides) and not any("stop_after" in w for w in overrides)
        train_apart(path, [*overrides, *(["optim.lr=1.001e-3"] if resumes else [])], ranks)

    monkeypatch.setattr(prove, "_train", wrong)
    with pytest.raises(SystemExit, match="1"):
        main(["prove-resume", config, *layout])
    said, error = capsys.readouterr()
    assert f"  {'data':14}bit-identical" in said and f"  {'loss':14}differs by up to" in said
    assert layout or "first in step 6" in said  # step 5 still has the parameters of before
    assert "nlm: the interrupted run is not the straight one" in error


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--at", "8"], "--at: expected a step before train.steps = 8, got 8"),
        (["--at", "0"], "--at: expected a step before train.steps = 8, got 0"),
        (["--layout-after", "tp=3"], "parallel.tp: expected a divisor of"),
        (["--layout-after", "tq=2"], "parallel.tq: unknown key"),
    ],
    ids=str,
)
def test_what_cannot_be_proved(
    arguments: list[str], problem: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove-resume", config, *arguments]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "before anything is trained"


def test_digest_of_rows_is_that_of_their_parts_together() -> None:
    from nlm.batch import Batch

    rows = torch.randint(300, (8, 17), generator=torch.Generator().manual_seed(0))
    whole = int(Batch(rows).digest(0))
    parts = sum(int(Batch(rows[i : i + 2]).digest(i)) for i in range(0, 8, 2))
    assert parts & 0xFFFFFFFF == whole
    others = [rows.flip(0), rows.flip(1), rows.roll(1, 0), rows + 1]
    changed = rows.clone()
    changed[7, 16] += 1
    assert len({whole, *(int(Batch(other).digest(0)) for other in [*others, changed])}) == 6
