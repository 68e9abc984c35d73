"""Text to token ids [n_tokens] and back: UTF-8 bytes, SentencePiece models, Hugging Face tokenizer files."""

import hashlib
import io
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, final

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

Ids = NDArray[np.int32]

END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
"""What Hugging Face vocabularies call the end of a document, in the order they are looked for."""

SPACE_MARK = "\u2581"  # how SentencePiece writes a space, so a real U+2581 needs care
RESERVED = SPACE_MARK + "\u2585\0"  # SentencePiece's trainer confuses these, or drops the text around them

CHUNK_CHARS = 4096
SAMPLE_CHUNKS = 250_000  # with CHUNK_CHARS, bounds the text held while a vocabulary is trained to 1 Gchar


class Tokenizer(Protocol):
    """Ids are in range(vocab_size); `eod` is the id that ends a document."""

    vocab_size: int
    eod: int

    def encode(self, texts: list[str]) -> list[Ids]:
        """n texts -> n arrays [n_tokens] int32: text only, no special token is added or recognized."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """[n_tokens] -> text. `eod` has no text; bytes that are not UTF-8 become U+FFFD."""
        ...

    def special(self, name: str) -> int | None:
        """The id of a token that no text is encoded to; None if there is no such."""
        ...


@final
class ByteTokenizer:
    """Ids 0 to 255 are UTF-8 bytes, 256 ends a document."""

    vocab_size = 257
    eod = 256

    def encode(self, texts: list[str]) -> list[Ids]:
        """n texts -> n arrays [n_bytes] int32."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """[n_tokens] -> text."""
        return bytes(i for i in np.asarray(ids).tolist() if i != self.eod).decode(errors="replace")

    def special(self, name: str) -> int | None:
        return None


@final
class SentencePieceTokenizer:
    """A SentencePiece model (Kudo & Richardson 2018, arXiv:1808.06226); its eos ends a document."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: expected a SentencePiece model; {error}") from error
        self.vocab_size: int = self._model.vocab_size()
        self.eod: int = self._model.eos_id()
        if self.eod < 0:
            raise ValueError(f"{path}: expected an eos piece to end documents, found none; train with one")
        # U+2581 would come back as a space; a model that has bytes and adds no prefix can spell it instead.
        mark: list[int] = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        a: list[int] = self._model.encode("a")
        self._mark = mark if self._model.decode(a + mark + a) == f"a{SPACE_MARK}a" else None

    def encode(self, texts: list[str]) -> list[Ids]:
        """n texts -> n arrays [n_tokens] int32."""
        encoded: list[list[int]] = self._model.encode(texts)
        if self._mark:
            for i, text in enumerate(texts):
                if SPACE_MARK in text:
                    first, *rest = self._model.encode(text.split(SPACE_MARK))
                    encoded[i] = sum((self._mark + part for part in rest), first)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """[n_tokens] -> text."""
        text: str = self._model.decode(np.asarray(ids, np.int32).tolist())
        return text

    def special(self, name: str) -> int | None:
        piece: int = self._model.piece_to_id(name)
        return piece if self._model.is_control(piece) else None


@final
class HuggingFaceTokenizer:
    """A `tokenizer.json`; the first of END_OF_TEXT in its vocabulary ends a document."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: expected a Hugging Face tokenizers file; {error}") from error
        vocab = self._model.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids may have holes
        ends = [vocab[token] for token in END_OF_TEXT if token in vocab]
        if not ends:
            raise ValueError(
                f"{path}: expected one of {', '.join(END_OF_TEXT)} in the vocabulary to end a document, "
                "found none; add one as a special token"
            )
        self.eod = ends[0]
        # A file may ask for truncation or padding, and "</s>" in a text must not end the document.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[Ids]:
        """n texts -> n arrays [n_tokens] int32."""
        encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """[n_tokens] -> text."""
        return self._model.decode([i for i in np.asarray(ids).tolist() if i != self.eod])

    def special(self, name: str) -> int | None:
        added = (token.content for token in self._model.get_added_tokens_decoder().values() if token.special)
        return self._model.token_to_id(name) if name in added else None


LOADERS: dict[str, Callable[[Path], Tokenizer]] = {
    ".model": SentencePieceTokenizer,
    ".json": HuggingFaceTokenizer,
}


def load_tokenizer(spec: str) -> Tokenizer:
    """`spec` is `byte`, a SentencePiece FILE.model or a Hugging Face FILE.json.

    Errors: ValueError for any other spec, a missing or unreadable file, a vocabulary without an end of text.
    """
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec)
    if path.suffix not in LOADERS:
        raise ValueError(f"tokenizer: expected byte, FILE.model or FILE.json, got {spec!r}")
    if not path.is_file():
        raise ValueError(f"{spec}: no such file; give a tokenizer that exists or --train-tokenizer")
    return LOADERS[path.suffix](path)


def tokenizer_sha256(spec: str) -> str | None:
    """Of the tokenizer's file; None for `byte`."""
    if spec == "byte":
        return None
    with open(spec, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def language_tag(language: str) -> str:
    """The special token that says into which language to translate."""
    return f"<2{language}>"


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out: Path, special: Sequence[str] = ()) -> Path:
    """Train a byte-fallback BPE model that gives every text back exactly, write it to `out`, return `out`.

    BPE as in Sennrich et al. 2016 (arXiv:1508.07909); no normalization, no dummy prefix, white space kept.
    Deterministic: one thread, and of more than SAMPLE_CHUNKS chunks of text a sample drawn with a fixed seed.
    `out` appears whole or not at all. The `special` tokens are of the vocabulary, but not of any text.

    Errors: ValueError when there is no text, or `vocab_size` is too large or too small for it.
    """
    sample, model = _sample(texts), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * CHUNK_CHARS,  # bytes; longer ones are left out
            control_symbols=[*special],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        expected = f"SentencePiece says: {error}"
        if largest := re.search(r"value <= (\d+)", str(error)):
            expected = f"the text is too small for it: give {largest[1]} or less, or more text"
        elif smallest := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            expected = f"it must hold 256 bytes and the text's characters: give {smallest[1]} or more"
        raise ValueError(f"vocabulary size {vocab_size} cannot be trained; {expected}") from error
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_bytes(model.getvalue())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _sample(texts: Iterable[str]) -> list[str]:
    """At most SAMPLE_CHUNKS chunks of the texts, each as likely as any other (Vitter 1985, algorithm R)."""
    draw = random.Random(0)
    sample: list[str] = []
    chunk = re.compile(f"[^{RESERVED}]{{1,{CHUNK_CHARS}}}")
    for seen, match in enumerate(match for text in texts for match in chunk.finditer(text)):
        if seen < SAMPLE_CHUNKS:
            sample.append(match[0])
        elif (place := draw.randrange(seen + 1)) < SAMPLE_CHUNKS:
            sample[place] = match[0]
    if not any(map(str.strip, sample)):
        raise ValueError("empty corpus: no text to train a tokenizer on; give inputs that hold text")
    return sample
