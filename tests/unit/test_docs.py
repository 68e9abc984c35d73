"""What the docs say can be done: every command is one that is there, on files that are there by then, and the short
form of the first two pages runs. `python tools/run_docs.py` runs the others."""

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Any

import docs_site
import pytest
from run_docs import BEFORE, CANNOT_RUN, LONG, PAGES, ROOT, blocks, commands, reason_not_to_run, run, script, shortened

from nlm.build import load_config, parse_config
from nlm.cli import make_parser, parse
from nlm.config import overridden
from nlm.launch import launch

BY_NAME = {page.name: page for page in PAGES}
EVERY = [(name, command) for name, page in BY_NAME.items() for language, text in blocks(page) if language == "sh"
         for command in commands(text)]  # fmt: skip
SHORT = "model.n_layers=2 model.dim=32 train.batch_tokens=128 train.seq_len=32 log.every=50 statistics.images_every=999"
SPLIT = re.compile(r"^(\||\|\||&&|;|<|>|>>|<<)$")
PLAYS = {"data/plays", "data/plays-held-out"}
MADE_BY_MAKE = {
    "quickstart": PLAYS | {f"runs/quickstart/{name}" for name in ("deepnorm", "post_ln", "pictures")},
    "data/plays.json": PLAYS,
    "docs": {"site"},
}
OUTSIDE = {"my-text", "data/help"}
"""The reader's own text, and what a script downloads."""


class Walk:
    """What a page's commands have made so far, and the configs of its runs, by folder."""

    def __init__(self) -> None:
        self.made: set[str] = set()
        self.configs: dict[str, dict[str, Any]] = {}
        self.nlm_commands = 0

    def needs(self, path: str | Path) -> None:
        path = str(path)
        if "$" in path or (ROOT / path).exists() or any(path == outside for outside in OUTSIDE):
            return
        if step := re.fullmatch(r"(.+)/checkpoints/step-(\d{8})", path):
            run, n = step[1], int(step[2])
            assert run in self.made, f"{path}: no command before makes the run"
            if run in self.configs:
                steps, every = (self.configs[run][section][key] for section, key in
                                (("train", "steps"), ("checkpoint", "every")))  # fmt: skip
                assert n == steps or (every and n % every == 0 and n < steps), f"{path}: the run saves no such step"
            return
        parents = [path, *map(str, Path(path).parents), path.removesuffix(Path(path).suffix)]
        assert self.made & set(parents) or any(m.startswith(f"{path.rstrip('/*')}/") for m in self.made), (
            f"{path}: not in the repository, and no command before makes it"
        )

    def config(self, path: str, overrides: list[str]) -> dict[str, Any]:
        """The config as the command would have it, loaded for real."""
        if (ROOT / path).exists():
            config = load_config(ROOT / path, overrides)
        else:
            self.needs(path)
            config = parse_config(overridden(self.configs[str(Path(path).parent)], overrides))
        return config.model_dump(exclude_none=True)

    def train(self, path: str, overrides: list[str]) -> None:
        config = self.config(path, overrides)
        data = config["data"]
        for source in (data["train"], data.get("validation")):
            for name in [source] if isinstance(source, str) else [source["path"]] if source else []:
                self.needs(name)
        if start := config["train"].get("start"):
            self.needs(start)
        self.made.add(config["log"]["dir"])
        self.configs[config["log"]["dir"]] = config

    def nlm(self, words: list[str]) -> None:
        """One command of nlm: parsed by the parser itself, its config loaded."""
        self.nlm_commands += 1
        asked = vars(parse(words))
        verb = words[0]
        for name in ("checkpoint", "folder", "file", "cluster", "sweep", "include_path"):
            if asked.get(name) is not None:
                self.needs(asked[name])
        many = [*asked.get("checkpoints", ()), *asked.get("runs", ()), *asked.get("inputs", ()), *asked.get("data", ())]
        for path in many:
            if "=" not in str(path):
                self.needs(path)
        if (tokenizer := asked.get("tokenizer")) not in (None, "byte", "none"):
            self.needs(tokenizer)
        if verb == "train":
            self.train(asked["config"], asked["overrides"])
        elif verb == "launch":  # also whether the cluster has as many ranks
            launch(str(ROOT / asked["config"]), asked["overrides"], ROOT / asked["cluster"], dry_run=True)
        elif "config" in asked:
            self.config(asked["config"], asked["overrides"])
        elif verb == "import":
            self.configs[asked["out"]] = overridden(self.configs[str(asked["folder"])], asked["overrides"])
            parse_config(self.configs[asked["out"]])
        elif verb == "export":
            self.configs[asked["out"]] = self.configs[str(Path(asked["checkpoint"]).parents[1])]
        if verb != "prove-resume" and asked.get("out"):
            self.made.add(str(asked["out"]))

    def one(self, words: list[str]) -> None:
        """A simple command."""
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        match words:
            case [] | ["." | "cat" | "ls" | "printf" | "docker" | "apptainer" | "cd", *_] if not set(words) & {"run"}:
                for word in words[1:]:
                    if word.startswith(("runs/", "docker/")):
                        self.needs(word)
            case ["docker", *rest]:
                self.docker(rest)
            case ["make", *targets]:
                for target in targets:
                    if "=" not in target:
                        assert re.search(
                            rf"^[^\n:=]*\b{re.escape(target)}\b[^\n:=]*:", (ROOT / "Makefile").read_text(), re.M
                        )
                        self.made |= MADE_BY_MAKE.get(target, set())
            case ["mkdir", *folders]:
                self.made |= {folder for folder in folders if not folder.startswith("-")}
            case ["cp", *rest]:
                *sources, to = [word for word in rest if not word.startswith("-")]
                for source in sources:
                    self.needs(source)
                    if source in self.configs:
                        self.configs[to] = self.configs[source]
                self.made.add(to)
            case _:
                self.program(words)

    def docker(self, words: list[str]) -> None:
        (i,) = [i for i, word in enumerate(words) if word.startswith("nlm:")]
        rest = words[i + 1 :]
        self.made |= PLAYS | {"data/mine"}  # mounted: another page makes them
        self.program(rest if rest[0] in {"torchrun", "nlm"} else ["nlm", *rest])

    def program(self, words: list[str]) -> None:
        for i, word in enumerate(words):
            if word == "nlm" and (i == 0 or words[i - 1] in {"-m", "--module"}):
                return self.nlm(words[i + 1 :])
            if re.fullmatch(r"launch/[\w.]+", word):
                assert (ROOT / word).is_file(), word
                return self.nlm(["preflight" if word.endswith("preflight.py") else "train", *words[i + 1 :]])
        known = words[0] in {"python", ".venv/bin/pip"} or (ROOT / words[0]).is_file()
        assert known, f"{shlex.join(words)}: not known to this test"
        if words[0] == "python" and words[1] not in {"-", "-c", "-m"}:
            assert (ROOT / words[1]).is_file(), words[1]
            if "--out" in words:
                self.made.add(words[words.index("--out") + 1])

    def walk(self, command: str) -> None:
        line = command.partition("\n")[0]
        line = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)", "$MADE", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        part: list[str] = []
        words = list(lexer)
        for i, word in enumerate([*words, ";"]):
            if not SPLIT.match(word):
                part.append(word)
                continue
            if part and not (i >= 2 and len(part) == 1 and words[i - 2] in {"<<", ">", ">>", "<"}):
                self.one(part)
            if i >= 2 and words[i - 2] == ">":
                self.made.add(part[0])
            part = []


@pytest.mark.parametrize("name", [name for name in BY_NAME if any(page == name for page, _ in EVERY)])
def test_commands(name: str) -> None:
    """Each parses, its config with its overrides is a good one, and its files are there, or made by one before it."""
    walk = Walk()
    for block in BEFORE.get(name, []):
        walk.walk(block)
    for command in (command for page, command in EVERY if page == name):
        try:
            walk.walk(command)
        except (AssertionError, ValueError, KeyError, SystemExit) as error:
            raise AssertionError(f"{name}: {command}\n{error!r}") from error
    assert walk.nlm_commands or name in {"README.md", "getting-started.md"}


def test_no_command_hides() -> None:
    """A command stands in a block of sh, not indented in the text or in a block without a language."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        unnamed = re.findall(
            r"^```\n(.*?)^```$", re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.M | re.S), re.M | re.S
        )
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for line in [*"\n".join(unnamed).splitlines(), *re.findall(r"^ {4}(.*)$", outside, re.M)]:
            assert not re.match(r"\s*(nlm \w|python |torchrun |make )", line), f"{page.name}: {line}"


def test_a_synopsis_parses() -> None:
    """In blocks of text, with words in the place of files."""
    found = [line for page in PAGES for _, text in blocks(page, ("text",)) for line in commands(text) if "nlm " in line]
    assert len(found) > 3
    for line in found:
        words = shlex.split(line, comments=True)
        parse(words[words.index("nlm") + 1 :])


def test_every_reason_not_to_run_is_of_some_command() -> None:
    for begin in CANNOT_RUN | LONG:
        assert any(re.match(begin, command) for _, command in EVERY), begin


@pytest.mark.parametrize(("name", "command"), [(n, c) for n, c in EVERY if reason_not_to_run(c)])
def test_a_command_that_cannot_run_here(name: str, command: str) -> None:
    assert f"\n{command}\n" not in script(BY_NAME[name]).replace(f": {command}\n", "")
    pytest.skip(f"{name}: {command.partition(chr(10))[0][:60]} … {reason_not_to_run(command)}")


def test_shortened_where_overrides_are_taken() -> None:
    assert shortened("nlm train a.toml b=1   # two", "c=2") == "nlm train a.toml b=1 c=2   # two"
    assert shortened("nlm probe a.toml | tail", "c=2") == "nlm probe a.toml c=2 | tail"
    assert shortened("nlm layers a", "c=2") == "nlm layers a"


def run_short(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    code = run(BY_NAME[name], folder, SHORT)
    out, err = capfd.readouterr()
    assert code == 0, out[-2000:] + err[-2000:]
    return out


def test_getting_started_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_short("getting-started.md", tmp_path, capfd)
    text = BY_NAME["getting-started.md"].read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w./]+)` \|", text, re.M)
    assert set(table) == {
        path.name + "/" * path.is_dir() for path in (tmp_path / "runs/quickstart/deepnorm").iterdir()
    } - {"alarms.jsonl"}
    assert (tmp_path / "runs/quickstart/pictures/report.html").is_file()


def test_the_tutorial_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = run_short("tutorial.md", tmp_path, capfd)
    assert "2 layers, " in out and out.count("My lord,") >= 2
    for made in ("report/own-text/report.html", "runs/own-text/evaluation", "out/own-text/config.json"):
        assert (tmp_path / made).exists(), made


# The site


def test_every_page_is_in_the_navigation() -> None:
    settings = docs_site.nav_pages()
    written = {str(page.relative_to(docs_site.DOCS)) for page in docs_site.DOCS.glob("**/*.md")}
    made = {path for path in docs_site.made_pages() if not path.startswith("source/")}
    assert len(settings) == len(set(settings)) and set(settings) == written | made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file in docs_site.linked_files(text, page):
        assert file.is_file(), os.path.relpath(file, ROOT)
    made = docs_site.made_pages()
    for target, _ in docs_site.LINK.findall(docs_site.relinked(text, page)):
        assert "://" in target or target in made or (docs_site.DOCS / target).is_file(), target


def test_the_reference_has_every_verb_and_option() -> None:
    text = docs_site.cli_reference()
    (verbs,) = [action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    sections = dict(re.findall(r"^## nlm ([\w-]+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert set(sections) == set(verbs.choices)
    for name, verb in verbs.choices.items():
        for option in (option for action in verb._actions for option in action.option_strings):
            assert f"| `{option}" in sections[name] or option in {"-h", "--help"}, f"{name} {option}"


def test_the_reference_has_every_key(make_config: Any) -> None:
    text = docs_site.config_reference()
    sections = dict(re.findall(r"^## \[([\w.]+)\] .*?\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    for table, keys in make_config().model_dump().items():
        for key in keys:
            assert f"\n| `{key}` | " in sections[table], f"{table}.{key}"
    assert "\n| `n_kv_heads` | integer > 0 | derived |" in sections["model"]
    assert "\n| `vocab_size` | integer > 0 | must be given |" in sections["model"]
    assert "\n| `steps` | integer > 0 | must be given |" in sections["train"]
    assert "\n| `dir` | string | derived |" in sections["log"]
    assert "\n| `seed` | integer ≥ 0 | `0` |" in sections["train"]
