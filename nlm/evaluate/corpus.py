"""A corpus to evaluate on, document by document: token shards, or files of text and the tokenizer of a run."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nlm.config import Config, ConfigError
from nlm.data.documents import find_files, read_documents, units
from nlm.data.lookup import find_tokenizer, has_shards
from nlm.data.shards import TokenShard, shard_facts
from nlm.data.source import prefixes
from nlm.data.tokenize import batched
from nlm.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256


class Document(NamedTuple):
    """Tokens [n], with the end of the document where there is one, and how many bytes of UTF-8 they are, if known."""

    tokens: NDArray[np.integer]
    bytes: int | None


class Corpus:
    """The documents of `data`: prefixes of token shards, directories of such, and what `nlm tokenize` takes.

    Errors: ValueError for data that is missing or damaged, has tokens that the model does not, or was made with another
    tokenizer than the model's, and for text where the model's tokenizer is not found.
    """

    def __init__(self, data: Sequence[str], config: Config, tokenizer: str | None = None, text_field: str = "text"):
        self.text_field = text_field
        sharded = {path: has_shards(path) for path in data}
        self.shards = [prefix for path in data if sharded[path] for prefix in prefixes(path)]
        texts = [path for path in data if not sharded[path]]
        self.files = find_files(texts) if texts else []
        self.tokenizer: str | None = None
        with suppress(*() if self.files or tokenizer else (ValueError,)):  # shards can be read without
            self.tokenizer = find_tokenizer(config.data, tokenizer)
        self.coder: Tokenizer | None = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        n_tokens = config.model.n_tokens
        if self.coder and self.coder.vocab_size > n_tokens:
            raise ConfigError(
                [f"--tokenizer: expected at most model.vocab_size = {n_tokens} tokens, got {self.coder.vocab_size}"]
            )
        for prefix in self.shards:
            if (largest := TokenShard(prefix).max_token()) is not None and largest >= n_tokens:
                raise ValueError(
                    f"{prefix}: has a token {largest}, the model {n_tokens}; tokenize with the model's own"
                )
            facts = shard_facts(prefix)
            if self.tokenizer and facts.get("tokenizer_sha256", ...) not in (..., tokenizer_sha256(self.tokenizer)):
                raise ValueError(
                    f"{prefix}: expected tokens of the model's tokenizer, got those of {facts['tokenizer']}; tokenize "
                    "again, or give the text itself"
                )

    @property
    def eod(self) -> int | None:
        """What ends a document."""
        if self.coder is not None:
            return self.coder.eod
        ends = {shard_facts(prefix).get("eod") for prefix in self.shards}
        return ends.pop() if len(ends) == 1 else None

    def documents(self) -> Iterator[Document]:
        for prefix in self.shards:
            shard = TokenShard(prefix)
            for i in range(shard.n_documents):
                yield Document(shard.document(i), n_bytes(shard.document(i), self.coder))
        texts = (
            text for unit in units(self.files) for piece in unit for text in read_documents(piece, self.text_field)
        )
        for some in batched(texts) if self.coder else ():
            assert self.coder is not None
            for text, ids in zip(some, self.coder.encode(some), strict=True):
                if ids.size:
                    yield Document(np.append(ids, self.coder.eod), len(text.encode()))


def n_bytes(tokens: NDArray[np.integer], coder: Tokenizer | None) -> int | None:
    """Of the text of tokens [n], as UTF-8; of half a character, about as many as it has."""
    return None if coder is None else len(coder.decode(tokens).replace("\ufffd", "?").encode())
