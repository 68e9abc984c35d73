"""The tokenizer of a run: what its training data state of theirs, found again on the disk."""

from pathlib import Path

from nlm.config import DataConfig, TranslationConfig
from nlm.data.shards import shard_facts, shard_path
from nlm.data.source import prefixes
from nlm.data.tokenizer import load_tokenizer, tokenizer_sha256

GIVE = "give the tokenizer with --tokenizer"


def find_tokenizer(data: DataConfig, given: str | None = None) -> str:
    """What `load_tokenizer` takes: the one `given`, or that of the training data, beside the shards if it is theirs.

    Errors: ValueError where the data state none, or not the same, the file is not there, or is another, given or not.
    """
    if given is not None:
        load_tokenizer(given)
        there = (path for path in _paths(data) if has_shards(path))
        stated = {sha256 for path in there for prefix in prefixes(path) for sha256 in _stated(prefix)}
        if stated and tokenizer_sha256(given) not in stated:
            raise ValueError(f"--tokenizer: expected the one that the data were made with, got another, {given}")
        return given
    specs = {_of_shard(prefix) for path in _paths(data) for prefix in prefixes(path)}
    specs |= {source.tokenizer for source in data.sources if source.tokenizer is not None}
    if len({tokenizer_sha256(spec) for spec in specs}) > 1:
        raise ValueError(f"data.train: its sources have different tokenizers, {', '.join(sorted(specs))}; {GIVE}")
    return min(specs)


def has_shards(path: str) -> bool:
    """Whether the prefix of a shard, or a directory of them, is there."""
    return shard_path(path, ".idx").exists() or any(Path(path).glob("*.idx"))


def _paths(data: DataConfig) -> list[str]:
    if isinstance(data.train, TranslationConfig):
        return [f"{data.train.path}.{language}" for language in data.train.languages]
    return [source.path for source in data.sources if source.path is not None]


def _stated(prefix: Path) -> list[str | None]:
    """The SHA-256 of the shard's tokenizer, where it states one."""
    facts = shard_facts(prefix)
    return [facts.get("tokenizer_sha256")] if "tokenizer" in facts else []


def _of_shard(prefix: Path) -> str:
    name = shard_facts(prefix).get("tokenizer")
    if not isinstance(name, str):
        raise ValueError(f"{prefix}.json: expected facts of a shard, its tokenizer among them, got none; {GIVE}")
    if name == "byte":
        return name
    places = (prefix.parent / name, shard_path(prefix, Path(name).suffix))  # a shard may have been renamed
    files = [str(file) for file in places if file.is_file()]
    if not files:
        raise ValueError(f"{places[0]}: expected the tokenizer of {prefix}, found no file; {GIVE}")
    same = [file for file in files if [tokenizer_sha256(file)] == _stated(prefix)]
    if not same:
        raise ValueError(
            f"{files[0]}: expected the tokenizer of {prefix}, with SHA-256 {_stated(prefix)[0]}, "
            f"got {tokenizer_sha256(files[0])}; {GIVE}"
        )
    return same[0]
