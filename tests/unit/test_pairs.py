"""Pairs to translate: from files of parallel text to batches, each a function of (config, its number) alone."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nlm.batch import Batch
from nlm.build import parse_config
from nlm.cli import main
from nlm.config import Config, ConfigError, DataConfig
from nlm.data import TokenShard, load_tokenizer
from nlm.data.pairs import PairCorpus, source_ids
from nlm.data.rank import RankData, pair_batch
from nlm.data.tokenize import tokenize_languages
from nlm.data.tokenizer import language_tag
from nlm.mesh import Mesh
from nlm.plan.shapes import shapes
from nlm.random import mixed

MakeConfig = Callable[..., Config]
LANGUAGES = ["en", "de", "it"]
TEXTS = [
    ("The door is open.", "Die Tür ist offen.", "La porta è aperta."),
    ("We wait.", "Wir warten.", "Aspettiamo."),
    ("It is raining again in the town by the sea.", "Es regnet wieder in der Stadt am Meer.", ""),
    ("Bread and salt", "Brot und Salz", "Pane e sale"),
    ("No one came.", "Niemand kam.", "Non venne nessuno."),
    ("The train to the north leaves at nine.", "Der Zug nach Norden fährt um neun.", "Il treno parte alle nove."),
    ("Write <2de> here.", "Hier <2de> schreiben.", "Scrivi <2de> qui."),
    ("Green", "", "Verde"),
    ("Two birds sat on the wall.", "Zwei Vögel saßen auf der Mauer.", ""),
    ("Where are you?", "Wo bist du?", ""),
    ("Stop!", "Halt!", ""),
    ("The last line.", "Die letzte Zeile.", ""),
]
"""English, German, Italian; some have no translation."""

COUNTS = {"en": 12, "de": 11, "it": 7}
PAIRS = {("en", "de"): 11, ("en", "it"): 7, ("de", "it"): 6}
"""How many there are of each, either way."""


@dataclass(frozen=True)
class Corpus:
    path: str
    model: str

    def text(self, ids: list[int]) -> str:
        return load_tokenizer(self.model).decode(ids)


def write_jsonl(folder: Path) -> Path:
    """A language that a record lacks is left out or null."""
    records = [
        {language: text or None for language, text in zip(LANGUAGES, texts, strict=True) if text or i % 2}
        for i, texts in enumerate(TEXTS)
    ]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("parallel")
    tokenize_languages([str(write_jsonl(folder))], str(folder / "out"), LANGUAGES, None, 360)
    return Corpus(str(folder / "out"), str(folder / "out.model"))


@pytest.fixture
def translation(make_config: MakeConfig, corpus: Corpus) -> MakeConfig:
    """`translation(seq_len=…, temperature=…, **sections)`: a config that reads the corpus."""

    def make(seq_len: int = 64, batch_tokens: int = 128, validation: str | None = None, **own: Any) -> Config:
        seed, parallel = own.pop("seed", 0), own.pop("parallel", {})
        train = {"seq_len": seq_len, "batch_tokens": batch_tokens, "seed": seed}
        config = make_config({"vocab_size": 361}, train=train, parallel=parallel)
        data = {"train": {"path": corpus.path, "languages": LANGUAGES} | own, "validation": validation}
        return config.model_copy(update={"data": DataConfig.model_validate(data)})

    return make


def pairs_in(batch: Any, corpus: Corpus, padding: int = 360) -> list[tuple[str, str, str]]:
    """(language of the target, source, target) of each row of a batch that is not empty, its form checked."""
    coder, found = load_tokenizer(corpus.model), []
    tags = {coder.special(language_tag(language)): language for language in LANGUAGES}
    for source, tokens in zip(batch.source.tolist(), batch.tokens.tolist(), strict=True):
        source, tokens = ([token for token in row if token != padding] for row in (source, tokens))
        if not tokens:
            assert source == [coder.eod]
            continue
        assert source[-1] == tokens[0] == tokens[-1] == coder.eod
        found.append((tags[source[0]], corpus.text(source[1:-1]), corpus.text(tokens[1:-1])))
    return found


def every_pair(*directions: str) -> Counter[tuple[str, str, str]]:
    places = {language: i for i, language in enumerate(LANGUAGES)}
    names = directions or [f"{a}-{b}" for a in LANGUAGES for b in LANGUAGES if a != b]
    sides = [(name[:2], name[3:]) for name in names]
    pairs = ((b, texts[places[a]], texts[places[b]]) for a, b in sides for texts in TEXTS)
    return Counter(pair for pair in pairs if all(pair))


def test_shards_of_all_languages_are_aligned(corpus: Corpus) -> None:
    coder = load_tokenizer(corpus.model)
    for language, texts in zip(LANGUAGES, zip(*TEXTS, strict=True), strict=True):
        shard = TokenShard(f"{corpus.path}.{language}")
        documents = [shard.document(i).tolist() for i in range(shard.n_documents)]
        assert [coder.decode(document) for document in documents] == list(texts)
        assert all(document[-1] == coder.eod for document in documents)
        assert shard.lengths().tolist() == [len(document) for document in documents]
        assert sum(len(document) > 1 for document in documents) == COUNTS[language]
        assert shard.facts()["tag"] == coder.special(language_tag(language))
        assert shard.facts()["tag"] not in shard.tokens, "a text is never taken for a tag"


def test_files_of_lines_columns_and_fields_are_the_same(corpus: Corpus, tmp_path: Path) -> None:
    columns = dict(zip(LANGUAGES, zip(*TEXTS, strict=True), strict=True))
    rows = [columns.keys(), *TEXTS]
    (tmp_path / "a.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(
        pa.table({name: [text or None for text in texts] for name, texts in columns.items()}), tmp_path / "a.parquet"
    )
    for name, texts in columns.items():
        (tmp_path / f"lines.{name}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    for given in ("a.tsv", "a.parquet", "lines"):
        tokenize_languages([str(tmp_path / given)], str(tmp_path / "b"), LANGUAGES, corpus.model, None)
        for name in LANGUAGES:
            assert (tmp_path / f"b.{name}.bin").read_bytes() == Path(f"{corpus.path}.{name}.bin").read_bytes()


def test_corpora_of_two_languages_make_one_of_three(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As OPUS-100 comes: files of English and one other language each. Where one has no file, its texts are missing."""
    texts = {"de-en.de": "Ja\nNein\n", "de-en.en": "Yes\nNo\n", "en-it.en": "Good\n", "en-it.it": "Bene\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    inputs, out = [str(tmp_path / "de-en"), str(tmp_path / "en-it")], str(tmp_path / "out")
    assert main(["tokenize", *inputs, "--languages", "en,de,it", "--tokenizer", corpus.model, "--out", out]) == 0
    assert "out.de: 3 documents" in capsys.readouterr().out
    found = {name: TokenShard(f"{out}.{name}") for name in LANGUAGES}
    rows = [[corpus.text(found[name].document(i)) for name in LANGUAGES] for i in range(3)]
    assert rows == [["Yes", "Ja", ""], ["No", "Nein", ""], ["Good", "", "Bene"]]


def test_parallel_files_that_are_none(corpus: Corpus, tmp_path: Path) -> None:
    def attempt(name: str, tokenizer: str = corpus.model) -> None:
        tokenize_languages([str(tmp_path / name)], str(tmp_path / "out"), ["en", "de"], tokenizer, None)

    (tmp_path / "lines.en").write_text("a\nb\n")
    (tmp_path / "lines.de").write_text("a\n")
    with pytest.raises(ValueError, match=r"as many documents in each language, got \{'en': 2, 'de': 1\}"):
        attempt("lines")
    (tmp_path / "columns.tsv").write_text("en\tde\none\n")
    with pytest.raises(ValueError, match=r"columns\.tsv, line 2: expected 2 columns as line 1 has, got 1"):
        attempt("columns.tsv")
    (tmp_path / "fields.jsonl").write_text('{"en": "a", "fr": "b"}\n')
    with pytest.raises(ValueError, match="empty corpus: no text of field 'de' in 1 files"):
        attempt("fields.jsonl")
    with pytest.raises(ValueError, match="byte: expected a special token <2en>, found none"):
        attempt("lines", "byte")


def test_every_pair_once_an_epoch(translation: MakeConfig, corpus: Corpus) -> None:
    """In every direction as often as it has pairs; and each epoch in another order."""
    found = PairCorpus(translation(directions=["de-en"]))
    assert found.said == f"{corpus.path}: 11 pairs in 1 directions, 0 longer than a row left out"
    epochs, number = [], 0
    for _ in range(3):
        epoch: list[tuple[str, str, str]] = []
        while len(epoch) < 11:
            number += 1
            epoch += pairs_in(found.batch(number), corpus)
        epochs.append(epoch)
        assert Counter(epoch) == every_pair("de-en")
        assert found.epochs(number) == {"de-en": len(epochs)}
    assert epochs[0] != epochs[1] != epochs[2]


def test_directions_to_and_from_one_language(translation: MakeConfig) -> None:
    assert PairCorpus(translation(directions=["de-*", "it-en"])).pairs.directions == ["de-en", "de-it", "it-en"]
    assert PairCorpus(translation(directions=["*-it"])).pairs.directions == ["en-it", "de-it"]


def test_directions_come_by_temperature(translation: MakeConfig) -> None:
    for temperature in (1.0, 2.0, 100.0):
        found = PairCorpus(translation(temperature=temperature))
        counts = found.rows(400)
        sizes = {f"{a}-{b}": n for pair, n in PAIRS.items() for a, b in (pair, pair[::-1])}
        assert dict(zip(found.pairs.directions, found.pairs.sizes.tolist(), strict=True)) == sizes
        total = sum(n ** (1 / temperature) for n in sizes.values())
        for name, n in counts.items():
            share = sizes[name] ** (1 / temperature) / total
            assert n / sum(counts.values()) == pytest.approx(share, rel=0.15), (temperature, name)
        assert found.epochs(400) == {name: n / sizes[name] for name, n in counts.items()}


def test_a_batch_is_full_and_of_like_length(translation: MakeConfig, corpus: Corpus, tmp_path: Path) -> None:
    """No side is larger than it may be, filled up, and little is filled up; but for one batch a pass, none is small."""
    random = np.random.default_rng(0)
    for language in ("en", "de"):  # of unlike lengths
        lines = ("".join(random.choice([*"aeinrst "], size=random.integers(1, 60))) for _ in range(2000))
        (tmp_path / f"long.{language}").write_text("".join(f"x{line}\n" for line in lines))
    out = str(tmp_path / "long")
    tokenize_languages([out], out, ["en", "de"], corpus.model, None)
    config = translation(batch_tokens=1024)
    data = {"train": {"path": out, "languages": ["en", "de"]}}
    found = PairCorpus(config.model_copy(update={"data": DataConfig.model_validate(data)}))
    batches = [found.batch(number) for number in range(1, 120)]
    sizes = np.array([[side.size for side in (batch.source, batch.tokens[:, 1:])] for batch in batches])
    longer = [np.maximum((b.source != 360).sum(1), (b.tokens[:, 1:] != 360).sum(1)) for b in batches]
    alike = [lengths.mean() / lengths.max() for lengths in longer]
    assert sizes.max() <= 1024
    assert np.sort(sizes.max(1))[2:].min() > 1024 - 64
    assert np.mean(alike) > 0.9
    assert all(batch.source.shape[1] % 8 == (batch.tokens.shape[1] - 1) % 8 == 0 for batch in batches)
    for batch in batches:
        for side in (batch.source, batch.tokens[:, 1:]):
            assert (side != 360).any(0)[: side.shape[1] - 7].all(), "no wider than the longest needs"


def test_a_batch_depends_on_config_and_number_only(translation: MakeConfig) -> None:
    straight = PairCorpus(translation())
    batches = [straight.batch(number) for number in range(1, 80)]
    for number in (79, 3, 40, 1):
        again = PairCorpus(translation()).batch(number)
        np.testing.assert_array_equal(again.tokens, batches[number - 1].tokens)
        np.testing.assert_array_equal(again.source, straight.batch(number).source)
    other = PairCorpus(translation(seed=1)).batch(1)
    assert other.tokens.shape != batches[0].tokens.shape or (other.tokens != batches[0].tokens).any()
    assert straight.rows(79) == PairCorpus(translation()).rows(79)
    counted = Counter(len(batch.tokens) for batch in batches)
    assert sum(straight.rows(79).values()) == sum(n * times for n, times in counted.items())


def test_ranks_take_equal_parts_of_the_same_pairs(translation: MakeConfig, corpus: Corpus) -> None:
    """Whatever the layout, empty rows make up for what does not divide, and count nothing."""
    alone, many = (
        PairCorpus(translation()),
        translation(parallel={"dp_replicate": 2, "microbatches": 2}, batch_tokens=256),
    )
    divided = PairCorpus(many.model_copy(update={"train": translation().train}))
    for number in range(1, 30):
        parts = [divided.batch(number, part, 2) for part in (0, 1)]
        assert len({part.tokens.shape for part in parts}) == 1 and len(parts[0].tokens) % 2 == 0
        whole = [pair for part in parts for pair in pairs_in(part, corpus)]
        assert whole == pairs_in(alone.batch(number), corpus)
        batches = [pair_batch(many, part, 0) for part in (*parts, alone.batch(number))]
        targets = [int(batch.n_targets()) for batch in batches]
        assert targets[0] + targets[1] == targets[2] > 0
        digests = [int(batch.digest(i * len(batch))) for i, batch in enumerate(batches[:2])]
        assert sum(digests) & 0xFFFFFFFF == int(batches[2].digest(0))


def test_what_the_model_reads_and_learns(translation: MakeConfig, corpus: Corpus) -> None:
    config = translation(directions=["en-it"])
    data = RankData(config, Mesh())
    batch = data.rows(5)
    assert isinstance(batch, Batch) and batch.has_ignored and batch.padding == 360
    assert torch.equal(batch.targets == -100, batch.tokens[:, 1:] == 360)
    assert int((batch.targets >= 0).sum()) == batch.n_targets()
    assert data.digest(batch) != data.digest(data.rows(6)) and data.digest(batch) == data.digest(data.rows(5))
    assert batch.keys is None
    random = config.model_copy(update={"model": config.model.model_copy(update={"stochastic_depth": 0.5})})
    keys = torch.cat([RankData(random, Mesh()).rows(number).keys for number in range(1, 20)])
    assert len(keys.unique()) == len(keys) and mixed(torch.arange(1)).dtype == keys.dtype


def test_validation_takes_every_pair_once(translation: MakeConfig, corpus: Corpus) -> None:
    config = translation(validation=corpus.path)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"batches": 1000})})
    for _ in range(2):
        batches = RankData(config, Mesh()).validation_batches()
        assert batches is not None
        assert Counter(pair for batch in batches for pair in pairs_in(batch, corpus)) == every_pair()
    few = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"batches": 3})})
    assert len(list(RankData(few, Mesh()).validation_batches() or ())) == 3


def test_long_pairs_are_left_out_and_counted(translation: MakeConfig, corpus: Corpus) -> None:
    lengths = {language: TokenShard(f"{corpus.path}.{language}").lengths() for language in ("en", "de")}
    both = (lengths["en"] > 1) & (lengths["de"] > 1)
    limit = int(np.median(lengths["de"]))
    fits = both & (lengths["en"] + 1 <= limit) & (lengths["de"] <= limit)
    found = PairCorpus(translation(limit, 2 * limit, directions=["en-de"]))
    assert 0 < fits.sum() < both.sum()
    assert (found.pairs.sizes.tolist(), found.pairs.too_long) == ([fits.sum()], both.sum() - fits.sum())
    widths = {side.shape[1] for n in range(1, 20) for side in (found.batch(n).source, found.batch(n).tokens[:, 1:])}
    assert max(widths) <= limit
    with pytest.raises(ValueError, match="expected pairs en-de of at most 3 and 3 tokens, found none"):
        PairCorpus(translation(3, 6, directions=["en-de"]))


def test_a_source_to_translate_is_as_in_training(translation: MakeConfig, corpus: Corpus) -> None:
    coder = load_tokenizer(corpus.model)
    found = PairCorpus(translation(directions=["en-de"])).batch(1).source[0]
    found = found[found != 360]
    text = corpus.text(found[1:-1])
    tag = coder.special("<2de>")
    assert tag is not None
    np.testing.assert_array_equal(source_ids(coder.encode([text])[0], tag, coder.eod, 64), found)
    cut = source_ids(coder.encode([text])[0], tag, coder.eod, 5)
    assert cut.tolist() == [*found[:4].tolist(), coder.eod]


def test_shards_that_do_not_fit_are_refused(
    translation: MakeConfig, corpus: Corpus, tmp_path: Path, make_config: MakeConfig
) -> None:
    config = translation()
    small = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 200})})
    with pytest.raises(ValueError, match=r"model\.vocab_size: expected more than \d+, where \d+ is a token of .*out\."):
        PairCorpus(small)
    (tmp_path / "one.en").write_text("a\n")
    (tmp_path / "one.de").write_text("b\n")
    tokenize_languages([str(tmp_path / "one")], corpus.path + "2", ["en", "de"], corpus.model, None)
    for suffix in (".bin", ".idx", ".json"):
        Path(f"{corpus.path}2.it{suffix}").write_bytes(Path(f"{corpus.path}.it{suffix}").read_bytes())
    with pytest.raises(ValueError, match="expected as many documents in each language"):
        PairCorpus(
            config.model_copy(
                update={
                    "data": DataConfig.model_validate({"train": {"path": corpus.path + "2", "languages": LANGUAGES}})
                }
            )
        )
    Path(f"{corpus.path}2.it.json").unlink()
    with pytest.raises(ValueError, match=r"it\.json: expected a tag; see `nlm tokenize --languages`"):
        PairCorpus(
            config.model_copy(
                update={
                    "data": DataConfig.model_validate({"train": {"path": corpus.path + "2", "languages": LANGUAGES}})
                }
            )
        )
    assert PairCorpus(config).fingerprint != PairCorpus(translation(directions=["en-de"])).fingerprint


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"languages": ["en"]}, r"data\.train\.translation\.languages: list should have at least 2 items"),
        ({"languages": ["en", "zh-cn"]}, r"languages\.1: string should match pattern"),
        ({"directions": ["en-fr"]}, "expected directions between two of en, de, it, got 'en-fr'"),
        ({"directions": ["en-en"]}, "expected directions between two of en, de, it, got 'en-en'"),
        ({"directions": ["en-de", "*-de"]}, "en-de is there twice"),
        ({"directions": ["*-fr"]}, r"got '\*-fr'"),
        ({"languages": ["en", "de", "en"]}, "en is there twice"),
        ({"temperature": 0.5}, "greater than or equal to 1"),
        ({}, r"data\.train: pairs to translate are for model\.architecture = 'encoder_decoder', got 'decoder'"),
    ],
)
def test_what_a_config_may_not_say(train: dict[str, Any], problem: str, make_config: MakeConfig) -> None:
    table = make_config().model_dump(exclude_none=True)
    table["data"]["train"] = {"path": "a", "languages": LANGUAGES} | train
    with pytest.raises(ConfigError, match=problem):
        parse_config(table)


@pytest.mark.parametrize("source_len", [24, 64])
def test_no_batch_is_larger_than_planned(source_len: int, corpus: Corpus, make_config: MakeConfig) -> None:
    """Those with the longest rows have no more of them, and all others no more tokens on a side."""
    config = make_config(
        {"architecture": "encoder_decoder", "vocab_size": 361},
        train={"seq_len": 48, "source_len": source_len, "batch_tokens": 192},
        data={"train": {"path": corpus.path, "languages": LANGUAGES}},
    )
    longest, full = shapes(config)
    assert (longest.target, longest.source) == (48, source_len)
    assert full.target == full.source == min(48, source_len)
    pairs, widths = PairCorpus(config), set[int]()
    for batch in (pairs.batch(number) for number in range(1, 20)):
        assert batch.source.size <= full.rows * full.source and batch.tokens[:, 1:].size <= full.tokens
        widths.add(width := max(batch.source.shape[1], batch.tokens.shape[1] - 1))
        assert width < max(48, source_len) or len(batch.tokens) <= longest.rows
    assert len(widths) > 1
