"""The code that goes out with a model: of nlm's own sources, the definitions that it refers to, and no others.

transformers loads code from one flat folder of files that import each other relatively. So nlm.norms.token becomes
nlm_norms_token.py, with those of its functions and classes that are needed, word for word.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PACKAGE = "nlm"
Definition = tuple[str, str]
"""A module and a name in it."""


class Import(NamedTuple):
    """What a name stands for in the module that imports it; without a `name`, the module itself."""

    module: str
    name: str | None


class Source:
    """A module's text and what its top level binds."""

    def __init__(self, module: str, text: str) -> None:
        self.module, self.lines = module, text.splitlines()
        self.body = ast.parse(text).body

    @cached_property
    def imports(self) -> dict[str, Import]:
        found: dict[str, Import] = {}
        for node in self.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {alias.asname or alias.name: Import(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.asname or alias.name: Import(alias.name, None) for alias in node.names}
        return found

    @cached_property
    def nodes(self) -> dict[str, ast.stmt]:
        """The statement that binds each name."""
        found: dict[str, ast.stmt] = {}
        for node in self.body:
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found[name] = node
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    found[name] = node
        return found

    def names(self, node: ast.stmt) -> Iterator[str]:
        """What a statement refers to, of the top level."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and (part.id in self.nodes or part.id in self.imports):
                yield part.id

    def text(self, node: ast.stmt) -> str:
        """With its decorators, and the string that documents a variable."""
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        after = self.body[self.body.index(node) + 1 :][:1]
        documents = isinstance(node, ast.Assign | ast.AnnAssign) and after and isinstance(after[0], ast.Expr)
        last = after[0].end_lineno if documents else node.end_lineno
        return "\n".join(self.lines[first - 1 : last])

    @property
    def docstring(self) -> str:
        first = self.body[0]
        is_one = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        return "\n".join(self.lines[: first.end_lineno]) if is_one else ""


@cache
def installed(module: str) -> Source:
    """Read, not imported."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} has no source"
    return Source(module, Path(spec.origin).read_text(encoding="utf-8"))


def bundle(entry: str, text: str) -> dict[str, str]:
    """File names -> their texts: ENTRY.py, which is `text` with its imports made relative, and what it refers to."""
    first = Source(entry, text)
    sources = {entry: first}
    kept: defaultdict[str, set[str]] = defaultdict(set)
    imports: defaultdict[str, set[tuple[str, Import]]] = defaultdict(set)
    pending: list[Definition] = [(entry, name) for name in first.nodes]
    while pending:
        module, name = pending.pop()
        source = sources.setdefault(module, first if module == entry else installed(module))
        if name in kept[module]:
            continue
        if name in source.nodes:
            kept[module].add(name)
            pending += [(module, other) for other in source.names(source.nodes[name])]
            continue
        meant = source.imports[name]
        imports[module].add((name, meant))
        if meant.name is not None and _is_ours(meant):
            pending.append((meant.module, meant.name))
    return {f"{flat(module)}.py": _written(sources[module], kept[module], imports[module]) for module in kept}


def flat(module: str) -> str:
    return module.replace(".", "_")


def _written(source: Source, kept: set[str], imports: set[tuple[str, Import]]) -> str:
    by_module: defaultdict[str, list[str]] = defaultdict(list)
    lines = []
    for name, (module, its_name) in sorted(imports, key=lambda pair: (_is_ours(pair[1]), pair[1].module, pair[0])):
        if its_name is None:
            lines.append(f"import {module}" + (f" as {name}" if name != module else ""))
        else:
            by_module[module].append(its_name if name == its_name else f"{its_name} as {name}")
    for module, names in by_module.items():
        where = f".{flat(module)}" if _is_ours(Import(module, None)) else module
        lines.append(f"from {where} import {', '.join(names)}")
    statements = [source.text(node) for name, node in source.nodes.items() if name in kept]
    return "\n\n\n".join([source.docstring + "\n\n" + "\n".join(lines), *statements]) + "\n"


def _is_ours(meant: Import) -> bool:
    return meant.module.partition(".")[0] == PACKAGE
