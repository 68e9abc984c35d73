"""What the site (mkdocs.yml) has beside docs/*.md, made when it is built: home is README.md, the reference comes from
the code, and a file of the repository that a page links to is a page of its own.

mkdocs calls the functions named on_….
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nlm  # noqa: E402
from nlm.build import load_config  # noqa: E402
from nlm.cli import make_parser  # noqa: E402
from nlm.config import Config, ConfigError, read_file  # noqa: E402
from nlm.schemes import SCHEMES  # noqa: E402

DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^()\s#]+)(#[^()\s]*)?\)")
EXAMPLE = ROOT / "configs/quickstart.toml"
"""A whole config, of which a key is left out to see whether it must be given."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made."""
    from mkdocs.structure.files import File

    for path, text in made_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as GitHub follows them become links of the site."""
    if page.file.generated_by is not None:
        return markdown
    return relinked(markdown, DOCS / page.file.src_uri)


@cache
def made_pages() -> dict[str, str]:
    """By path in the site, the text of each page that is made."""
    written = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
    linked = {file for page, text in written.items() for file in linked_files(text, page) if DOCS not in file.parents}
    pages = {source_page(file): source_text(file) for file in sorted(linked) if file.is_file()}
    return pages | {
        "index.md": relinked(written[ROOT / "README.md"], ROOT / "README.md"),
        "reference/python.md": python_reference(),
        "reference/scheme.md": scheme_reference(),
        "reference/config.md": config_reference(),
        "reference/cli.md": cli_reference(),
    }


def linked_files(text: str, page: Path) -> Iterator[Path]:
    """What a page links to in the repository, whether it is there or not."""
    for target, _ in LINK.findall(text):
        if "://" not in target:
            yield (page.parent / target).resolve()


def relinked(text: str, page: Path) -> str:
    """A link to a page of docs/ leads to it from the top of the site, one to another file to the page of its text."""

    def follow(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        file = (page.parent / target).resolve()
        if "://" in target or not file.is_file():
            return link[0]
        return f"]({file.relative_to(DOCS) if DOCS in file.parents else source_page(file)}{anchor})"

    return LINK.sub(follow, text)


def source_page(file: Path) -> str:
    """Where in the site a file is that is no page of docs/."""
    if file == ROOT / "README.md":
        return "index.md"
    return f"source/{file.relative_to(ROOT)}.md"


def source_text(file: Path) -> str:
    language = {".py": "python", ".sh": "sh"}.get(file.suffix, file.suffix[1:])
    text = file.read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {file.relative_to(ROOT)}\n\n````{language}\n{text}````\n"


def python_reference() -> str:
    """What `import nlm` gives, from the docstrings."""
    named = {name: f"{nlm.HOMES[name]}.{name}" for name in nlm.__all__}
    functions = [name for name in named if not name.isupper()]
    choices = [name for name in named if name.isupper()]
    return "\n".join(
        [
            "# Python",
            "\nAll that stands here is had from `import nlm`; torch is imported when the first of it is asked for.",
            *(f"\n::: {named[name]}\n    options:\n      heading_level: 2" for name in functions),
            "\n## Choices by name",
            "\nWhat a config may name: mappings from name to class. `nlm schemes` prints all with their fields.",
            "\n| | of | names |\n|---|---|---|",
            *(
                f"| `nlm.{name}` | `{nlm.HOMES[name]}` | {', '.join(f'`{key}`' for key in getattr(nlm, name))} |"
                for name in choices
            ),
            "\n## The model",
            "\n::: nlm.model.Transformer\n    options:\n      heading_level: 3\n      members: [forward]",
            "\n## Its config",
            "\nWhat its keys mean: [Config keys](config.md).",
            "\n::: nlm.config.Config\n    options:\n      heading_level: 3\n      members: [to_toml, parse]",
            "",
        ]
    )


def scheme_reference() -> str:
    """What a scheme is made of, and what each of the schemes says of itself."""
    text = [
        "# Scheme interface",
        "\nHow to write one: [Your own scheme](../index.md#your-own-scheme). What was measured of each:"
        " [schemes](../schemes.md).",
        "\n::: nlm.schemes.base\n    options:\n      heading_level: 2\n      show_root_heading: false"
        "\n      show_root_toc_entry: false",
        "\n::: nlm.anatomy\n    options:\n      heading_level: 2\n      show_root_heading: false"
        "\n      show_root_toc_entry: false",
        "\n## The schemes",
    ]
    for name, scheme in SCHEMES.items():
        doc = sys.modules[scheme.__module__].__doc__ or ""
        own = [f for f in fields(scheme) if f.init]
        text += [f"\n### `{name}` {{ #{name} }}", f"\n{doc.strip()}"]
        if own:
            text.append("\nFields of `[model.scheme]`:")
            text.append(", ".join(f"`{f.name}`" + ("" if f.default is MISSING else f" (`{f.default!r}`)") for f in own))
    return "\n".join(text) + "\n"


def config_reference() -> str:
    """Every key of every table, from the classes that check them."""
    schema = Config.model_json_schema()
    tables = list(_tables(schema, schema["properties"], ""))
    text = [
        "# Config keys",
        "\nA config is TOML, in these tables. A key that no table has is an error, and so is a value of another type."
        " `extends` names files that this one begins from, and `table.key=value` on the command line wins over all.",
    ]
    for table, name in tables:
        section = schema["$defs"][name]
        heading = f"[[{table}]]" if table == "data.train" and name == "SourceConfig" else f"[{table}]"
        text += [f"\n## {heading} {{ #{name} }}", f"\n{section.get('description', '').strip()}"]
        text += ["\n| key | type | default |", "|---|---|---|"]
        required = section.get("required", [])
        for key, kind in section["properties"].items():
            default = (
                _must(table, key) if key in required else f"`{_toml(kind['default'])}`" if kind["default"] is not None
                else "none"
            )  # fmt: skip
            text.append(f"| `{key}` | {_kind(kind, schema['$defs'])} | {default} |")
        if schema["$defs"][name].get("additionalProperties"):
            text.append("\nBeside these the fields of what is named: `nlm schemes` prints them.")
    return "\n".join(text) + "\n"


def _tables(schema: Mapping[str, Any], properties: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Every table and its class, in the order of the classes."""
    for key, kind in properties.items():
        for option in [kind, *kind.get("anyOf", ()), *kind.get("oneOf", ())]:
            option = option.get("items", option)
            if name := option.get("$ref", "").rpartition("/")[2]:
                yield f"{prefix}{key}", name
                yield from _tables(schema, schema["$defs"][name]["properties"], f"{prefix}{key}.")


def _must(table: str, key: str) -> str:
    """Whether a key that its class asks for follows from others where it is left out."""
    given = read_file(EXAMPLE)
    if not isinstance(section := given.get(table), dict):
        return "must be given"
    section.pop(key, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.toml")
        file.write_text(tomli_w.dumps(given), encoding="utf-8")
        try:
            load_config(file)
        except ConfigError:
            return "must be given"
    return "derived"


def _kind(kind: Mapping[str, Any], classes: Mapping[str, Any]) -> str:
    """A type of a JSON schema in words."""
    if options := kind.get("anyOf") or kind.get("oneOf"):
        return ", or ".join(_kind(option, classes) for option in options if option.get("type") != "null")
    if ref := kind.get("$ref"):
        return f"table [{ref.rpartition('/')[2]}](#{ref.rpartition('/')[2]})"
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if "prefixItems" in kind:
        return f"list of {len(kind['prefixItems'])}: {_kind(kind['prefixItems'][0], classes)}"
    if "items" in kind:
        return f"list of {_kind(kind['items'], classes)}"
    words = {"integer": "integer", "number": "number", "string": "string", "boolean": "true or false"}[kind["type"]]
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {kind[limit]:g}" for limit, sign in signs.items() if limit in kind]
    return f"{words} {', '.join(limits)}".strip()


def _toml(value: Any) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip() if not isinstance(value, dict) else repr(value)


def cli_reference() -> str:
    """Every verb and its arguments, from the parser itself."""
    parser = make_parser()
    (verbs,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    helps = {choice.dest: choice.help or "" for choice in verbs._choices_actions}
    text = ["# Command line", f"\n{parser.description} `nlm VERB --help` says the same as this page.", "\n```text"]
    text += [str(parser.epilog).rstrip(), "```"]
    for name, verb in verbs.choices.items():
        text += [f"\n## nlm {name}", f"\n{helps[name][:1].upper()}{helps[name][1:]}."]
        text += ["\n| argument | |", "|---|---|"]
        for action in verb._actions:
            if isinstance(action, argparse._HelpAction) or action.help is argparse.SUPPRESS:
                continue
            metavar = action.metavar if isinstance(action.metavar, str) else ""
            shown = " ".join(filter(None, [", ".join(action.option_strings), metavar]))
            shown += " …" if action.nargs in ("+", "*") else ""
            must = "; must be given" if action.required and action.option_strings else ""
            text.append(f"| `{_cell(shown)}` | {_cell(action.help or '')}{must} |")
    return "\n".join(text) + "\n"


def _cell(help: str) -> str:
    return help.replace("|", "\\|")


def nav_pages() -> list[str]:
    """The pages that mkdocs.yml has in its navigation."""

    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from leaves(value)

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return [*leaves(settings["nav"])]
