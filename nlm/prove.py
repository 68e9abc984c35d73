"""`nlm prove-resume`: a config trained straight through and with an interruption, and the two runs compared."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nlm.build import load_config
from nlm.compare import Difference, differences
from nlm.config import Config, ConfigError

LOSS_LIMIT = 1e-6
"""How far the loss may be off, relatively, where the layout changed."""

WORDS = {"batch_digest": "data", "grad_norm": "gradient norm"}


def prove_resume(path: str, overrides: Sequence[str], at: int | None, layout_after: str | None) -> bool:
    """Prints what is the same and where the rest first differs -> whether resuming is proved.

    The interrupted run ends after step `at` (half of all), and another process goes on, in the layout that
    `layout_after` ("tp=2,pp=2": keys of [parallel]) makes of the config's. Proved means bit-identical, or with another
    layout the same data and a loss within LOSS_LIMIT. The runs lie in log.dir/prove-resume, and stay there.

    Errors: ConfigError before anything is trained; OSError when a run fails.
    """
    changes = [f"parallel.{change}" for change in layout_after.split(",")] if layout_after else []
    before, after = (load_config(path, [*overrides, *more]) for more in ([], changes))
    steps = before.train.steps
    at = max(1, steps // 2) if at is None else at
    if not 0 < at < steps:
        raise ConfigError([f"--at: expected a step before train.steps = {steps}, got {at}"])
    folder = Path(before.log.dir) / "prove-resume"
    shutil.rmtree(folder, ignore_errors=True)

    def run(name: str, config: Config, *more: str) -> Path:
        _train(path, [*overrides, f"log.dir={folder / name}", "log.every=1", *more], config.parallel.ranks)
        return folder / name

    straight = run("straight", before)
    run("interrupted", before, f"train.stop_after={at}")
    found = differences(run("interrupted", after, *changes), straight, number_by_number=True)
    print(f"interrupted after step {at} of {steps}, then " + (f"with {layout_after}" if changes else "as before"))
    print(*_lines(found), sep="\n")
    if not changes:
        return not any(difference.first for difference in found.values())
    return not found["batch_digest"].first and found["loss"].size <= LOSS_LIMIT


def _train(path: str, overrides: Sequence[str], ranks: int) -> None:
    """`nlm train` as the ranks of a config on this machine. Errors: OSError when it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "nlm", "train", path, *overrides]
    if code := subprocess.run(command, check=False).returncode:
        raise OSError(f"exit code {code} of `{' '.join(command)}`; see what it printed above")


def _lines(found: dict[str, Difference]) -> Iterator[str]:
    """One a kind; the statistics of layers are one kind here."""
    kinds: dict[str, Difference] = {}
    for name, difference in found.items():
        kind = "statistics" if name.startswith("layers/") else WORDS.get(name, name)
        first = f"{difference.first}, {name}" if kind == "statistics" and difference.first else difference.first
        before = kinds.get(kind, Difference())
        kinds[kind] = Difference(max(before.size, difference.size), before.first or first)
    for kind, (size, first) in kinds.items():
        yield f"  {kind:14}" + ("bit-identical" if first is None else f"differs by up to {size:.1e}, first in {first}")
