"""A run's tokenizer as `tokenizer.json`, by which transformers makes the same ids of the same text."""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nlm.data.tokenizer import END_OF_TEXT, SPACE_MARK, ByteTokenizer, load_tokenizer

proto: Any = sentencepiece_model_pb2  # its classes are made at run time


def write_tokenizer(spec: str, folder: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json -> the id that ends a text.

    Errors: ValueError for a SentencePiece model that is not BPE, or that changes text before it encodes it.
    """
    eod = load_tokenizer(spec).eod
    if spec == "byte":
        made = json.loads(_bytes().to_str())
    elif spec.endswith(".model"):
        made = json.loads(_sentencepiece(Path(spec)).to_str())
    else:
        made = json.loads(Path(spec).read_text(encoding="utf-8"))
    # nlm puts nothing around a text, cuts nothing off and fills nothing up.
    made |= {"post_processor": None, "truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(eod),
        "split_special_tokens": True,  # a text that spells one does not have one
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return eod


def _bytes() -> Tokenizer:
    letters = decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    decoder, splitter = letters
    # The library writes each byte as a letter; of 0 to 255, in the order that GPT-2 gave them.
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in kept else next(others)): byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    made.pre_tokenizer, made.decoder = splitter, decoder
    made.add_special_tokens([AddedToken(END_OF_TEXT[0], special=True)])
    assert made.token_to_id(END_OF_TEXT[0]) == ByteTokenizer.eod, "the end of text comes after the bytes"
    return made


def _sentencepiece(path: Path) -> Tokenizer:
    """As BPE by ranked merges: a piece can be put together of any two that are in the vocabulary, the more readily the
    higher its score."""
    model = proto.ModelProto.FromString(path.read_bytes())
    trainer, normalizer, Piece = model.trainer_spec, model.normalizer_spec, proto.ModelProto.SentencePiece
    problems = {
        "its type is BPE": trainer.model_type == proto.TrainerSpec.BPE,
        "it leaves characters as they are": not normalizer.precompiled_charsmap,
        "it keeps white space": not normalizer.remove_extra_whitespaces,
        "it has no pieces of its user's": all(piece.type != Piece.USER_DEFINED for piece in model.pieces),
    }
    if missed := [expected for expected, holds in problems.items() if not holds]:
        raise ValueError(
            f"{path}: expected a SentencePiece model such that {', '.join(missed)}, as --train-tokenizer makes them; "
            "convert it yourself, and export with --tokenizer none"
        )
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}
    merges = []
    for whole in sorted(normal, key=lambda piece: -normal[piece]):
        pairs = ((whole[:i], whole[i:]) for i in range(1, len(whole)))
        merges += sorted(
            (p for p in pairs if p[0] in normal and p[1] in normal), key=lambda p: (vocab[p[0]], vocab[p[1]])
        )
    unknown = next(piece.piece for piece in model.pieces if piece.type == Piece.UNKNOWN)
    made = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback))
    spaces, steps = normalizers.Replace(" ", SPACE_MARK), [decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = spaces
    made.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), *steps])
    special = [piece.piece for piece in model.pieces if piece.type in (Piece.CONTROL, Piece.UNKNOWN)]
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return made
