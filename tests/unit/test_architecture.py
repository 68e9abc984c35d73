"""What design keeps apart: imports go downward only, and no file but a scheme's own knows its name."""

import ast
import re
from pathlib import Path

import pytest

import nlm
from nlm import SCHEMES

PACKAGE = Path(nlm.__file__).parent
LEVELS = [
    [
        "nlm.anatomy",
        "nlm.config",
        "nlm.parallel.gloo",
        "nlm.parallel.hang",
        "nlm.parallel.ranklog",
        "nlm.parallel.waits",
    ],
    ["nlm.parallel.watch"],
    [
        "nlm.batch",
        "nlm.cluster",
        "nlm.guard",
        "nlm.layout",
        "nlm.plain",
        "nlm.signals",
        "nlm.sinks",
        "nlm.storage",
        "nlm.parallel.tensor",
        "nlm.parallel.launch",
    ],
    ["nlm.activations", "nlm.cache", "nlm.norms", "nlm.positions", "nlm.random", "nlm.runtime", "nlm.mesh"],
    ["nlm.kernels", "nlm.weight_norms", "nlm.scores", "nlm.data", "nlm.timing"],
    ["nlm.schemes"],
    ["nlm.model"],
    ["nlm.float8", "nlm.init", "nlm.parallel.pieces"],
    ["nlm.calibrate"],
    ["nlm.optim"],
    ["nlm.parallel", "nlm.evaluate.translation"],
    ["nlm.decode", "nlm.evaluate.predictions"],
    ["nlm.build", "nlm.evaluate.loss", "nlm.statistics"],
    ["nlm.plan"],
    ["nlm.environment"],
    ["nlm.checkpoint", "nlm.faults", "nlm.fold", "nlm.metrics", "nlm.stop"],
    ["nlm.average", "nlm.compare", "nlm.preflight", "nlm.export", "nlm.transition"],
    ["nlm.launch", "nlm.train", "nlm.prove", "nlm.probe"],
    ["nlm.evaluate", "nlm.remove_norms"],
    ["nlm.cli", "nlm"],
    ["nlm.__main__"],
]
"""A module may import what stands in a line above its own, and its own package."""

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FILES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


def entry(module: str) -> tuple[int, str]:
    """The line that a module stands in, under its own name or its package's."""
    lines = {name: i for i, names in enumerate(LEVELS) for name in names}
    parts = module.split(".")
    for n in range(len(parts), 1 if len(parts) > 1 else 0, -1):
        if (name := ".".join(parts[:n])) in lines:
            return lines[name], name
    raise AssertionError(f"{module} has no level: give it one")


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
        if name.partition(".")[0] == "nlm" and entry(name)[1] != entry(module)[1]:
            assert entry(name)[0] < entry(module)[0], f"{module} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if "schemes" not in path.parts], ids=str)
def test_no_scheme_is_named_outside_its_folder(path: Path) -> None:
    tree = ast.parse((PACKAGE.parent / path).read_text())
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docs:
            words |= set(re.findall(r"\w+", node.value))
    assert not words & (set(SCHEMES) | {scheme.__name__ for scheme in SCHEMES.values()})
