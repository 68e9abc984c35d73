"""From text to batches: tokenizers, token shards on disk, and the order in which training reads them.

Everything is numpy. `documents` and `tokenize`, which only `nlm tokenize` needs, are not imported here.
"""

from nlm.data.order import Batches, Permutation, validation_batches
from nlm.data.shards import ShardWriter, TokenShard
from nlm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

__all__ = [
    "Batches",
    "Permutation",
    "ShardWriter",
    "TokenShard",
    "Tokenizer",
    "load_tokenizer",
    "train_sentencepiece",
    "validation_batches",
]
