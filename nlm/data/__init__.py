"""From text to batches: tokenizers, token shards on disk, and the order in which training reads them.

Everything is numpy. `documents` and `tokenize`, which only `nlm tokenize` needs, are not imported here.
"""

from nlm.data.order import Permutation
from nlm.data.shards import ShardWriter, TokenShard
from nlm.data.source import ShardSource
from nlm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

__all__ = [
    "Permutation",
    "ShardSource",
    "ShardWriter",
    "TokenShard",
    "Tokenizer",
    "load_tokenizer",
    "train_sentencepiece",
]
