"""Prompts from a file or from standard input."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path


def read_prompts(file: Path | None) -> list[str]:
    """Of standard input without a file: one prompt a line; of a .jsonl one a line, which is a string or an object that
    has it as "prompt". Blank lines are passed over.

    Errors: ValueError for another suffix than .txt and .jsonl, text that is not UTF-8, a line that is neither, or no
    prompt at all.
    """
    if file is None:
        return _some([line for line in sys.stdin.read().splitlines() if line.strip()], "stdin")
    if file.suffix not in {".txt", ".jsonl"}:
        raise ValueError(f"{file}: expected prompts in a .txt or .jsonl file; rename it")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; convert it") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if file.suffix == ".txt":
        return _some([line for _, line in numbered], file)
    return _some(_objects(numbered, file), file)


def _objects(lines: Iterable[tuple[int, str]], file: Path) -> list[str]:
    prompts = []
    for number, line in lines:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON: {error}") from error
        prompt = found.get("prompt") if isinstance(found, dict) else found
        if not isinstance(prompt, str):
            raise ValueError(f'{file}, line {number}: expected a string or {{"prompt": "…"}}, got {line[:80]}')
        prompts.append(prompt)
    return prompts


def _some(prompts: list[str], source: Path | str) -> list[str]:
    if not prompts:
        raise ValueError(f"{source}: expected prompts, found none")
    return prompts
