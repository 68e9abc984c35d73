"""The images' Dockerfile agrees with the repository, and what they start with and report is what it says.

That its steps install a working nlm is shown by docker/try.sh, which takes too long for the suite.
"""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")

Stage = list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    """By name, the instructions of each stage: (word, rest)."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found: dict[str, Stage] = {"": []}
    for line in filter(None, joined.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        found[list(found)[-1]].append((word, rest))
    return found


def ancestors(name: str) -> list[str]:
    """A stage and those it stands on, the nearest first."""
    (start,) = [rest.split(" AS ")[0] for word, rest in stages()[name] if word == "FROM"]
    return [name, *(ancestors(start) if start in stages() else [])]


def instructions(name: str) -> Stage:
    return [line for stage in reversed(ancestors(name)) for line in stages()[stage]]


TARGETS = ["cpu", "cpu-compile", "cuda"]


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for lines in stages().values():
        for word, rest in lines:
            *sources, _ = rest.split()
            if word != "COPY":
                continue
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in stages(), rest
            else:
                copied.update(sources)
    for source in copied:
        assert (ROOT / source).exists(), source
    assert {source.split("/")[0] for source in copied} == sent


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_no_root_without_pip_and_with_a_compiler_only_where_it_is_needed(target: str) -> None:
    lines = instructions(target)
    assert [rest for word, rest in lines if word == "USER"][-1] == "1000:1000"
    assert ("g++" in " ".join(rest for word, rest in lines if word == "RUN")) == (target != "cpu")
    assert [word for word, _ in lines].count("ENTRYPOINT") == 1
    assert [word for word, _ in lines].count("HEALTHCHECK") == 1
    (packages,) = [rest.split()[0].removeprefix("--from=") for word, rest in lines if rest.startswith("--from=")]
    assert instructions(packages)[-1][1].endswith("pip uninstall --yes pip")


def test_all_is_pinned() -> None:
    assert re.search(r"^ARG BASE=\S+:\S*\d{8}\S*@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    constraints = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    (made,) = re.findall(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"torch==([\d.]+)", DOCKERFILE) == [made, made] == [constraints["torch"]] * 2
    installs = [rest for lines in stages().values() for word, rest in lines if "pip install" in rest]
    assert len(installs) == 4
    assert all("pip install --constraint constraints.txt " in rest for rest in installs)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (chosen,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert set(chosen.split(",")) <= set(extras)


def test_packages_differ_in_torch_alone() -> None:
    after_torch = []
    for name in ("cpu-packages", "cuda-packages"):
        lines = stages()[name]
        (i,) = [i for i, (word, rest) in enumerate(lines) if word == "RUN" and "[$EXTRAS]" not in rest]
        after_torch.append(lines[i + 1 :])
    assert after_torch[0] == after_torch[1] != []


def test_ci_builds_every_image() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert [entry["target"] for entry in jobs["image"]["strategy"]["matrix"]["include"]] == TARGETS


def run(script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A script of the image, with the programs of this environment for those of the image's."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"} | env
    return subprocess.run(
        [DOCKER / script, *words], env=environment, text=True, capture_output=True, cwd=ROOT, timeout=240
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["nlm", "--help"]], ids=str)
def test_the_entrypoint_helps(words: list[str], tmp_path: Path) -> None:
    done = run("entrypoint.sh", *words, NLM_STARTED=str(tmp_path / "started"))
    # Without a word Docker passes the image's CMD; here nlm says what it misses.
    assert done.returncode == (0 if words else 2), done.stderr
    assert (done.stdout + done.stderr).startswith("usage: nlm")
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (["plan", "--help"], "usage: nlm plan"),
        (["export", "--help"], "usage: nlm export"),  # also a word of the shell
        (["torchrun", "--help"], "usage: torchrun"),
        (["deepspeed", "--help"], "usage: deepspeed"),
        (["sh", "-c", 'echo "$1" $#', "-", "a  b", "c"], "a  b 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_entrypoint_starts(words: list[str], starts: str, tmp_path: Path) -> None:
    done = run("entrypoint.sh", *words, NLM_STARTED=str(tmp_path / "started"))
    assert done.returncode == 0, done.stderr
    assert starts in done.stdout


def test_the_entrypoint_passes_on_how_it_ended() -> None:
    """Also where it cannot note the start, as under a read-only root."""
    assert run("entrypoint.sh", "no-such-verb", NLM_STARTED="/nonexistent/started").returncode == 2
    assert run("entrypoint.sh", "sh", "-c", "exit 75", NLM_STARTED="/nonexistent/started").returncode == 75


@pytest.mark.parametrize(
    ("started", "logged", "healthy"),
    [
        (None, 3600, True),  # not begun by the entrypoint
        (7200, None, True),  # nothing logged yet
        (1800, 3600, True),  # another run's log, from before
        (7200, 60, True),
        (7200, 3600, False),
    ],
)
def test_health(started: int | None, logged: int | None, healthy: bool, tmp_path: Path) -> None:
    """Seconds ago that the container started, and that a run last logged."""
    paths = {tmp_path / "started": started, tmp_path / "runs/a/metrics.jsonl": logged}
    for path, age in paths.items():
        if age is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
    done = run("health.sh", NLM_STARTED=str(tmp_path / "started"), NLM_RUNS=str(tmp_path))
    assert (done.returncode == 0) == healthy, done.stdout
    assert ("30 minutes" in done.stdout) != healthy
