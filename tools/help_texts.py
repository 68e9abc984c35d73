"""Parallel text: LibreOffice's help in eight languages, as Debian packages it, aligned by file and paragraph.

    python tools/help_texts.py --out data/help

writes train.jsonl, validation.jsonl and test.jsonl, a paragraph a line with its text in each language that has it. A
paragraph goes to one of the three by a hash of its English text, so that all that say the same are on one side. The
text is under the Mozilla Public License 2.0; it is fetched with `apt-get download`, and nothing is installed.
"""

import argparse
import hashlib
import json
import re
import subprocess
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGES = {
    "de": "de",
    "en": "en-us",
    "es": "es",
    "fr": "fr",
    "it": "it",
    "ja": "ja",
    "ru": "ru",
    "zh": "zh-cn",
}
"""What Debian calls the packages libreoffice-help-… of our languages."""

PARAGRAPH = re.compile(r"(par|hd)_id\w+")
HELD_OUT = {"validation": 10, "test": 10}
"""Of a thousand paragraphs, how many are not trained on."""
CHARS = range(2, 1001)


class Paragraphs(HTMLParser):
    """The text of each paragraph and heading that has an id, by that id; where one comes twice, the first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._id: str | None = None
        self._tag, self._text = "", list[str]()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        name = dict(attributes).get("id") or ""
        if self._id is None and PARAGRAPH.fullmatch(name):
            self._id, self._tag, self._text = name, tag, []
        elif tag == "br":
            self._text.append(" ")

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._id is not None and tag == self._tag:
            self.found.setdefault(self._id, " ".join("".join(self._text).split()))
            self._id = None


def paragraphs(folder: Path) -> dict[tuple[str, str], str]:
    """The paragraphs of a language's help below `folder`, by file and id."""
    (text,) = folder.glob("usr/share/libreoffice/help/*/text")
    found = {}
    for path in sorted(text.rglob("*.html")):
        parser = Paragraphs()
        parser.feed(path.read_text(encoding="utf-8"))
        name = str(path.relative_to(text))
        found |= {(name, key): paragraph for key, paragraph in parser.found.items()}
    return found


def aligned(languages: dict[str, dict[tuple[str, str], str]]) -> list[dict[str, str]]:
    """One record a paragraph that is there in English and some other language: its text in each, but for English that
    was left as it is, and every record once."""
    records, seen = [], set()
    for key, english in languages["en"].items():
        if len(english) not in CHARS or not any(map(str.isalpha, english)):
            continue
        record = {
            language: text
            for language, texts in languages.items()
            if len(text := texts.get(key, "")) in CHARS and (language == "en" or text != english)
        }
        if len(record) > 1 and (whole := json.dumps(record)) not in seen:
            seen.add(whole)
            records.append(record)
    return records


def split_of(english: str) -> str:
    place = int.from_bytes(hashlib.sha256(english.encode()).digest()[:8], "big") % 1000
    for name, share in HELD_OUT.items():
        if place < share:
            return name
        place -= share
    return "train"


def unpacked(folder: Path, packages: dict[str, str]) -> dict[str, Path]:
    """Where the packages of the languages are unpacked below `folder`."""
    names = {language: f"libreoffice-help-{package}" for language, package in packages.items()}
    subprocess.run(["apt-get", "download", "--quiet", *names.values()], cwd=folder, check=True)
    for language, name in names.items():
        (package,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, folder / language], check=True)
    return {language: folder / language for language in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        folders = unpacked(Path(scratch), PACKAGES)
        records = aligned({language: paragraphs(folder) for language, folder in folders.items()})
    for split in ("train", *HELD_OUT):
        chosen = [record for record in records if split_of(record["en"]) == split]
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts = Counter(pair for record in chosen for pair in combinations(sorted(record), 2))
        print(
            f"{split}: {len(chosen):,} paragraphs; " + ", ".join(f"{a}-{b} {counts[a, b]:,}" for a, b in sorted(counts))
        )


if __name__ == "__main__":
    main()
