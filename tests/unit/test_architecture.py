"""What design keeps apart: imports go downward only, and no file but a scheme's own knows its name."""

import ast
import re
from pathlib import Path

import pytest

import nlm
from nlm import SCHEMES

PACKAGE = Path(nlm.__file__).parent
LEVELS = [
    ["nlm.anatomy", "nlm.config"],
    ["nlm.norms", "nlm.runtime", "nlm.data"],
    ["nlm.schemes", "nlm.attention"],
    ["nlm.model"],
    ["nlm.init", "nlm.parallel"],
    ["nlm.optim", "nlm.statistics", "nlm.build"],
    ["nlm.checkpoint", "nlm.metrics", "nlm.evaluate"],
    ["nlm.train"],
    ["nlm.cli", "nlm"],
    ["nlm.__main__"],
]
"""A module may import what stands in a line above its own, and its own package."""

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FILES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


def level(module: str) -> int:
    for i, names in enumerate(LEVELS):
        if any(module == name or (name != "nlm" and module.startswith(f"{name}.")) for name in names):
            return i
    raise AssertionError(f"{module} has no level: give it one")


def package(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_downward(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE.parent / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    for name in imported:
        if name.partition(".")[0] == "nlm" and package(name) != package(module):
            assert level(name) < level(module), f"{module} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if "schemes" not in path.parts], ids=str)
def test_no_scheme_is_named_outside_its_folder(path: Path) -> None:
    tree = ast.parse((PACKAGE.parent / path).read_text())
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docs:
            words |= set(re.findall(r"\w+", node.value))
    assert not words & (set(SCHEMES) | {scheme.__name__ for scheme in SCHEMES.values()})
