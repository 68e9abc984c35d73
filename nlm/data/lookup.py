"""The tokenizer of a run: what its training data state of theirs, found again on the disk."""

from pathlib import Path

from nlm.config import DataConfig
from nlm.data.shards import shard_facts
from nlm.data.source import prefixes
from nlm.data.tokenizer import tokenizer_sha256

GIVE = "give the tokenizer with --tokenizer"


def find_tokenizer(data: DataConfig) -> str:
    """What `load_tokenizer` takes. A shard's file is looked for beside it, and must be the one that it was made with.

    Errors: ValueError where the data state none, or not the same, or the file is not there or another.
    """
    specs = {
        spec
        for source in data.sources
        for spec in ([source.tokenizer] if source.path is None else map(_of_shard, prefixes(source.path)))
        if spec is not None
    }
    different = {tokenizer_sha256(spec): spec for spec in specs}
    if len(different) > 1:
        raise ValueError(f"data.train: its sources have different tokenizers, {', '.join(sorted(specs))}; {GIVE}")
    return min(specs)


def _of_shard(prefix: Path) -> str:
    facts = shard_facts(prefix)
    name = facts.get("tokenizer")
    if not isinstance(name, str):
        raise ValueError(f"{prefix}.json: expected facts of a shard, its tokenizer among them, got none; {GIVE}")
    if name == "byte":
        return name
    file = prefix.parent / name
    if not file.is_file():
        raise ValueError(f"{file}: expected the tokenizer of {prefix}, found no file; {GIVE}")
    if (sha256 := tokenizer_sha256(str(file))) != facts.get("tokenizer_sha256"):
        raise ValueError(
            f"{file}: expected the tokenizer of {prefix}, with SHA-256 {facts.get('tokenizer_sha256')}, "
            f"got {sha256}; {GIVE}"
        )
    return str(file)
