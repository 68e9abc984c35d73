"""Generation: with a cache every model says what it says without, and the search finds what it should."""

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from entries import COMBINATIONS
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

import nlm
from nlm import build_model, generate, load_tokenizer
from nlm.build import calibration, design
from nlm.checkpoint import load_checkpoint, save_checkpoint
from nlm.cli import main
from nlm.config import Config, DataConfig, SourceConfig
from nlm.data.lookup import find_tokenizer
from nlm.data.tokenize import tokenize
from nlm.data.tokenizer import Tokenizer, train_sentencepiece
from nlm.decode.generate import CachedDecoder, Speaking
from nlm.decode.search import Beams, Sampling, beam_search, sample, text_key
from nlm.init import init
from nlm.model import Transformer

MakeConfig = Callable[..., Config]
SEQ_LEN = 12
POSITIONS = ("rope", "rope_interleaved", "learned", "sinusoidal", "none")
DECODERS = {name: model for name, model in COMBINATIONS.items() if "architecture" not in model} | {
    position: {"scheme": {"name": "pre_ln"}, "position": position} for position in POSITIONS
}


def shaken(config: Config, dtype: torch.dtype = torch.float32) -> Transformer:
    """With every parameter off its initial value: branches that begin at 0 would hide what is in them."""
    model, generator = design(config).to(dtype).to_empty(device="cpu").eval(), torch.Generator().manual_seed(1)
    init(model, config.train.seed, calibration(config, config.train.seed))
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 * (parameter.abs().mean() + 0.1)
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def texts(rows: int, length: int = SEQ_LEN) -> Tensor:
    return torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def difference(model: Transformer, x: Tensor, starts: Sequence[int]) -> float:
    """The largest difference of the logits from those of the training forward, as a share of the largest of these:
    row b of x [B S] begins with starts[b] tokens, the others come one by one; rows that are through leave."""
    expected, decoder, worst = model(x), CachedDecoder(model), 0.0
    seen, rows = list(starts), list(range(len(x)))
    logits = decoder.start([x[row, : seen[row]].tolist() for row in rows])
    while True:
        for i, row in enumerate(rows):
            worst = max(worst, float((logits[i] - expected[row, seen[row] - 1]).abs().max()))
        left = [i for i, row in enumerate(rows) if seen[row] < x.shape[1]]
        if not left:
            return worst / float(expected.abs().max())
        if len(left) < len(rows):
            decoder.select(left)
        rows = [rows[i] for i in left]
        logits = decoder.step([int(x[row, seen[row]]) for row in rows])
        for row in rows:
            seen[row] += 1


@pytest.mark.parametrize("model", DECODERS.values(), ids=DECODERS.keys())
def test_logits_are_those_of_the_training_forward(model: dict[str, Any], make_config: MakeConfig) -> None:
    """Every scheme, norm, score, weight norm and kind of position, prompts of every length in one batch."""
    config = make_config({"activation": "swiglu", "n_kv_heads": 2, "n_layers": 2} | model)
    starts = range(1, SEQ_LEN + 1, 2)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        assert difference(shaken(config, dtype), texts(len(starts)), starts) < bound


@pytest.mark.parametrize("position", POSITIONS)
def test_beyond_the_context_of_training(position: str, make_config: MakeConfig) -> None:
    """What positions by a formula allow is what a model of the same weights with a longer context does."""
    keys = {"position": position}
    model = shaken(make_config(keys))
    prompts = [[3, 1, 4], [1] * SEQ_LEN]
    if position in {"learned", "sinusoidal"}:
        with pytest.raises(ValueError, match=r"prompt 2: expected at most 12 positions.*shorten them"):
            generate(model, prompts, max_tokens=2)
        (first,), (second,) = generate(model, prompts, temperature=0)
        assert (len(first.tokens), len(second.tokens)) == (SEQ_LEN + 1 - 3, 1), "the last token needs no position"
        return
    longer = make_config(keys, train={"seq_len": 2 * SEQ_LEN, "batch_tokens": 4 * SEQ_LEN})
    reference = build_model(longer).eval()
    reference.load_state_dict(model.state_dict())
    for (found,), prompt in zip(generate(model, prompts, max_tokens=10, temperature=0), prompts, strict=True):
        assert found.tokens == greedy(reference, prompt, 10)
    with pytest.raises(ValueError, match="give max_tokens to go beyond"):
        generate(model, [[1] * (SEQ_LEN + 1)])


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], n: int) -> tuple[int, ...]:
    """Everything computed anew for every token."""
    text = list(prompt)
    for _ in range(n):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return tuple(text[len(prompt) :])


def test_rows_that_are_selected_go_on_from_what_they_were(make_config: MakeConfig) -> None:
    model, x = shaken(make_config()), texts(3)
    decoder = CachedDecoder(model)
    decoder.start([x[0, :2].tolist(), x[1, :5].tolist(), x[2, :3].tolist()])
    decoder.select([2, 0, 2, 1])
    decoder.step([7, 8, 9, 10])
    decoder.select([3, 1, 0, 2])
    logits = decoder.step([11, 12, 13, 14])
    for row, (source, n, added) in enumerate([(1, 5, [10, 11]), (0, 2, [8, 12]), (2, 3, [7, 13]), (2, 3, [9, 14])]):
        expected = model(torch.tensor([[*x[source, :n].tolist(), *added]]))[0, -1]
        assert torch.allclose(logits[row], expected, atol=1e-5)


def test_room_is_made_a_few_times_only(make_config: MakeConfig) -> None:
    """64 tokens, of which each adds to what is there: the memory of a site moves as often as its size doubles."""
    model, moves = shaken(make_config()), Counter[int]()
    decoder, places = CachedDecoder(model), dict[int, int]()
    decoder.start([[1]])
    for _ in range(63):
        decoder.step([2])
        for i, kept in enumerate(decoder.cache._kept.values()):
            moves[i] += places.get(i) != kept[0].data_ptr()
            places[i] = kept[0].data_ptr()
    assert len(moves) == model.n_layers and set(moves.values()) == {6}  # to 2, 4, 8, 16, 32 and 64


class Table:
    """The simplest decoder there is: logits [N V V] by the number of tokens that came after the prompt, and the last.

    A second kind of decoder, that the search knows as little as the first.
    """

    def __init__(self, seed: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(9, vocab_size, vocab_size, generator=generator, dtype=torch.float64)
        self.rows = list[int]()
        self.place = 0

    def start(self, texts: Sequence[Sequence[int]]) -> Tensor:
        self.rows, self.place = [text[-1] for text in texts], 0
        return self.logits[0, self.rows]

    def step(self, tokens: Sequence[int]) -> Tensor:
        assert len(tokens) == len(self.rows)
        self.rows, self.place = list(tokens), self.place + 1
        return self.logits[self.place, self.rows]

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def log_prob(self, prompt: int, tokens: Sequence[int]) -> float:
        p = self.logits.log_softmax(-1)
        return sum(float(p[i, a, b]) for i, (a, b) in enumerate(zip([prompt, *tokens], tokens, strict=False)))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_beams_that_are_wide_enough_find_the_best_there_is(seed: int, penalty: float) -> None:
    vocab_size, end, limits = 4, 3, [3, 4]
    table, width = Table(seed, vocab_size), vocab_size**4
    found = beam_search(table, [[0], [2, 1]], limits, end, Beams(width, penalty))
    for prompt, limit, ranked in zip([0, 1], limits, found, strict=True):
        scores = {}
        for n in range(1, limit + 1):
            for tokens in product(range(vocab_size), repeat=n):
                if end not in tokens[:-1] and (n == limit or tokens[-1] == end):
                    scores[tokens] = table.log_prob(prompt, tokens) / ((5 + n) / 6) ** penalty
        best = sorted(scores, key=scores.__getitem__, reverse=True)
        assert [text.tokens for text in ranked] == best
        assert [text.log_prob for text in ranked] == pytest.approx([table.log_prob(prompt, t) for t in best])
        assert all(text.ended == (text.tokens[-1] == end) for text in ranked)


@pytest.mark.parametrize("penalty", [0.6, 3.0])
@pytest.mark.parametrize("seed", range(20))
def test_a_prompt_is_searched_no_longer_than_needed_and_no_shorter(seed: int, penalty: float) -> None:
    """Narrow beams that stop early find what those that go on to the limit do: hypotheses of all lengths, by hand."""
    vocab_size, end, width, limit = 6, 5, 3, 8
    table = Table(seed, vocab_size)
    table.logits *= 2  # some tokens are nearly certain: a text may rise past shorter ones that ended
    (found,) = beam_search(table, [[0]], [limit], end, Beams(width, penalty))
    live, done = [((), 0.0)], dict[tuple[int, ...], float]()
    for n in range(1, limit + 1):
        candidates = sorted(
            (((*t, v), table.log_prob(0, (*t, v))) for t, _ in live for v in range(vocab_size)), key=lambda x: -x[1]
        )
        ended = [(t, p) for t, p in candidates[:width] if t[-1] == end or n == limit]
        done |= {t: p / ((5 + n) / 6) ** penalty for t, p in ended}
        live = [(t, p) for t, p in candidates if t[-1] != end][:width]
    assert [text.tokens for text in found] == sorted(done, key=done.__getitem__, reverse=True)[:width]


def test_one_beam_is_greedy_and_more_are_no_worse(make_config: MakeConfig) -> None:
    model, prompts = shaken(make_config()), [[1, 2, 3], [4], [5, 6]]
    taken = generate(model, prompts, max_tokens=6, temperature=0)
    assert [one.tokens for (one,) in taken] == [greedy(model, prompt, 6) for prompt in prompts]
    (one,), (beams,) = (zip(*generate(model, prompts, max_tokens=6, beams=width), strict=True) for width in (1, 8))
    assert [text.tokens for text in one] == [text.tokens for (text,) in taken]
    for text, better, prompt in zip(one, beams, prompts, strict=True):
        assert better.log_prob > text.log_prob - 1e-6
        logits = model(torch.tensor([[*prompt, *better.tokens]]))[0].double().log_softmax(-1)
        expected = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(better.tokens)[:, None]).sum()
        assert better.log_prob == pytest.approx(float(expected), abs=1e-4)


def test_what_is_drawn_depends_on_seed_and_prompt_alone(make_config: MakeConfig) -> None:
    model, prompts = shaken(make_config()), [[i] * (1 + i % 4) for i in range(7)]

    def drawn(**how: Any) -> list[list[tuple[int, ...]]]:
        return [[text.tokens for text in found] for found in generate(model, prompts, max_tokens=6, n=3, **how)]

    together = drawn(batch=7, seed=5)
    assert together == drawn(batch=1, seed=5) == drawn(batch=3, seed=5)
    assert len({text for found in together for text in found}) == 21, "every sample has chance of its own"
    assert together != drawn(seed=6)
    assert drawn() == drawn(seed=0)
    end = together[0][0][2]
    cut = [[t[: t.index(end) + 1] if end in t else t for t in found] for found in together]
    assert drawn(seed=5, end=end) == cut, "nor on which texts are through"
    (first, *_) = generate(model, prompts, max_tokens=3, seed=5)
    assert first[0].tokens == together[0][0][:3], "nor on how many tokens follow"


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), {0, 1, 2, 3, 4}),
        (Sampling(temperature=0.5), {0, 1, 2, 3, 4}),
        (Sampling(top_k=3), {1, 2, 4}),
        (Sampling(top_p=0.7), {2, 4}),
        (Sampling(top_p=0.69), {2, 4}),
        (Sampling(top_p=0.4), {2}),
        (Sampling(top_k=3, top_p=0.85), {1, 2, 4}),
        (Sampling(temperature=2.0, top_k=4, top_p=1.0), {0, 1, 2, 4}),
        (Sampling(temperature=0), {2}),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, kept: set[int]) -> None:
    p = torch.tensor([0.08, 0.15, 0.45, 0.02, 0.3], dtype=torch.float64)
    table = Table(0, 5)
    table.logits = p.log().expand(1, 5, 5)
    n = 4000
    keys = [[text_key(0, 0, i) for i in range(n)]]
    drawn = Counter(d.token for d in sample(table, [[0]], [1], None, sampling, keys))
    weights = {i: float(p[i]) ** (1 / (sampling.temperature or 1)) for i in kept}
    for i in range(5):
        share = weights.get(i, 0.0) / sum(weights.values())
        assert abs(drawn[i] / n - share) <= 5 * (share * (1 - share) / n) ** 0.5


def test_texts_end_where_they_end() -> None:
    """With the token that ends them, each at its own time, or at the limit; and a row that is through is not asked."""
    table, end = Table(1, 5), 2
    keys = [[text_key(0, i, j) for j in range(20)] for i in range(2)]
    found: dict[int, list[int]] = {}
    for row, token, log_prob in sample(table, [[0], [1]], [4, 9], end, Sampling(), keys):
        before = found.setdefault(row, [])
        assert log_prob == pytest.approx(
            table.log_prob(row // 20, [*before, token]) - table.log_prob(row // 20, before)
        )
        before.append(token)
    assert len(found) == 40 and len({len(tokens) for tokens in found.values()}) > 4
    for row, tokens in found.items():
        assert end not in tokens[:-1] and (tokens[-1] == end or len(tokens) == (4 if row < 20 else 9))


@pytest.fixture(scope="module", params=["byte", "sentencepiece", "hugging_face"])
def coder(request: pytest.FixtureRequest, plays: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "byte":
        return load_tokenizer("byte")
    folder, text = tmp_path_factory.mktemp("tokenizer"), plays[0].read_text(encoding="utf-8")
    if request.param == "sentencepiece":
        return load_tokenizer(str(train_sentencepiece([text], 500, folder / "play.model")))
    bpe = HuggingFace(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    bpe.save(str(folder / "play.json"))
    return load_tokenizer(str(folder / "play.json"))


@given(st.text(max_size=8), st.text(max_size=20))
def test_pieces_of_text_are_whole_characters(coder: Tokenizer, prompt: str, text: str) -> None:
    prompt, text = (x.replace("\ufffd", "").replace("\u2581", "") for x in (prompt, text))
    before, after = (x.tolist() for x in coder.encode([prompt, text]))
    speaking = Speaking(coder, before)
    pieces = [*map(speaking.add, after), speaking.rest()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


@given(st.data())
def test_pieces_of_anything_are_its_text(coder: Tokenizer, data: st.DataObject) -> None:
    """Of tokens that are no UTF-8, too, with the end of a text among them."""
    tokens = data.draw(st.lists(st.integers(0, coder.vocab_size - 1), max_size=12))
    speaking = Speaking(coder, [])
    assert "".join([*map(speaking.add, tokens), speaking.rest()]) == coder.decode(tokens)


def test_a_piece_comes_as_soon_as_nothing_can_change_it() -> None:
    speaking = Speaking(load_tokenizer("byte"), [*b"a"])
    assert [speaking.add(byte) for byte in "é🎉".encode()] == ["", "é", "", "", "", "🎉"]
    assert [speaking.add(byte) for byte in b"\xf0\x9f."] == ["", "", "\ufffd."]
    assert (speaking.add(0xC3), speaking.rest(), speaking.rest()) == ("", "\ufffd", "")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a number from 0 on, got -1.0"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"top_p": 0.0}, "top_p: expected more than 0"),
        ({"n": 0}, "n: expected at least 1"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"beams": 0}, "beams: expected at least 1"),
        ({"beams": 2, "n": 3}, "n: expected at most as many as there are beams"),
        ({"beams": 2, "length_penalty": -1.0}, "length_penalty: expected a number from 0 on"),
        ({"beams": 2, "top_k": 3, "seed": 0}, "top_k, seed: nothing is drawn at random with beams"),
        ({"length_penalty": 1.0}, "give beams"),
        ({"temperature": 0, "top_p": 0.5}, "top_p: nothing is drawn at random at temperature 0"),
        ({"temperature": 0, "n": 2}, "n: expected 1"),
        ({"prompts": [[1], [96]]}, r"prompt 2: expected tokens in range\(96\), at least one, got 96 to 96"),
        ({"prompts": [[]]}, "prompt 1: expected tokens in .* got none"),
        ({"prompts": ["text"]}, "tokenizer: expected one for prompts of text"),
        ({"tokenizer": "byte"}, "tokenizer: expected at most 96 tokens, which the model has, got 257"),
        ({"show": print}, "show: expected a tokenizer, one prompt"),
    ],
    ids=str,
)
def test_choices_that_are_refused(how: dict[str, Any], message: str, make_config: MakeConfig) -> None:
    model = build_model(make_config()).eval()
    how = {"prompts": [[1, 2]]} | how
    if "tokenizer" in how:
        how["tokenizer"] = load_tokenizer(how["tokenizer"])
    with pytest.raises(ValueError, match=message):
        generate(model, **how)


def test_models_that_are_refused(make_config: MakeConfig) -> None:
    encoder = build_model(make_config({"architecture": "encoder", "norm": "batchnorm"})).eval()
    with pytest.raises(ValueError, match="expected a decoder, got an encoder"):
        generate(encoder, [[1]])
    decoder = build_model(make_config())
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        generate(decoder, [[1]])
    torch.nn.init.constant_(decoder.eval().get_parameter("head.weight"), torch.nan)
    for how in ({"temperature": 0}, {"beams": 2}):
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            generate(decoder, [[1]], max_tokens=2, **how)


def test_no_token_that_the_tokenizer_does_not_have(make_config: MakeConfig) -> None:
    """A vocabulary may be padded; its rows beyond the tokenizer's are never learned."""
    model = shaken(make_config({"vocab_size": 300}))
    with torch.no_grad():
        model.get_parameter("head.weight")[257:] *= 100
    coder = load_tokenizer("byte")
    assert max(max(text.tokens) for (text,) in generate(model, [[1], [2]], max_tokens=8)) > 256
    for how in ({"seed": 1}, {"beams": 3}):
        assert max(max(text.tokens) for (text,) in generate(model, ["a", ""], coder, max_tokens=8, **how)) <= 256


@pytest.fixture
def checkpoint(run_config: MakeConfig, tmp_path: Path) -> Path:
    """Of a byte-level model that has learned nothing, but not of what data it is."""
    config = run_config("run")
    save_checkpoint(tmp_path / "checkpoint", shaken(config), config)
    return tmp_path / "checkpoint"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_checkpoint(checkpoint)
    coder, at = load_tokenizer("byte"), str(checkpoint)
    ((one,),) = nlm.generate(model, ["To be"], coder, max_tokens=9, seed=3)
    streamed = said(capsys, at, "--max-tokens", "9", "--seed", "3", "To be")
    assert streamed == f"To be{one.text}\n"
    ((best, *_),) = nlm.generate(model, ["To be"], coder, max_tokens=5, beams=3, length_penalty=0.6)
    beams = "--max-tokens", "5", "--beams", "3", "--length-penalty", "0.6"
    assert said(capsys, at, "To be", *beams) == f"To be{best.text}\n"

    prompts = ["To be", 'a\n"b"']
    expected = nlm.generate(model, prompts, coder, max_tokens=4, temperature=0.7, top_k=9, top_p=0.9, n=2)
    sampling = ["--max-tokens", "4", "--temperature", "0.7", "--top-k", "9", "--top-p", "0.9", "--n", "2"]
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps(prompts[0])}\n\n{json.dumps({'prompt': prompts[1], 'id': 1})}\n")
    lines = said(capsys, at, "--file", str(file), *sampling, "--json", "--batch", "1").splitlines()
    found = [json.loads(line) for line in lines]
    assert [(f["prompt"], f["sample"]) for f in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for facts, text in zip(found, (text for of_prompt in expected for text in of_prompt), strict=True):
        assert (facts["text"], facts["tokens"], facts["ended"]) == (text.text, list(text.tokens), text.ended)
        assert facts["log_prob"] == pytest.approx(text.log_prob, abs=1e-4)

    monkeypatch.setattr("sys.stdin", io.StringIO("To be\n\nor not\n"))
    greedily = "--max-tokens", "3", "--temperature", "0"
    from_stdin = said(capsys, at, *greedily)
    (tmp_path / "prompts.txt").write_text("To be\n\nor not\n")
    assert from_stdin == said(
        capsys, at, "--file", str(tmp_path / "prompts.txt"), *["--max-tokens", "3"], "--temperature", "0"
    )
    assert from_stdin.startswith("--- 1.1\nTo be") and "\n--- 2.1\nor not" in from_stdin


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--file", "none.txt"], "--file: expected prompts or a file of them, got both"),
        (["--file", "prompts.md"], "prompts.md: expected prompts in a .txt or .jsonl file"),
        (["--file", "empty.txt"], "empty.txt: expected prompts, found none"),
        (["--file", "latin.txt"], "latin.txt: not UTF-8 at byte 1"),
        (["--file", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--file", "other.jsonl"], 'other.jsonl, line 1: expected a string or {"prompt": "…"}, got {"text": "a"}'),
        (["a" * 33, "--temperature", "0"], "give max_tokens to go beyond"),
        (["a", "--tokenizer", "gpt2"], "tokenizer: expected byte, FILE.model or FILE.json"),
    ],
    ids=str,
)
def test_what_the_command_line_refuses(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('"a"\n{"prompt"}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    words = [str(tmp_path / word) if "." in word and word != "gpt2" else word for word in arguments]
    assert main(["generate", str(checkpoint), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out.count("\n") == 0


def test_the_tokenizer_of_a_run(shard: str, plays: list[Path], tmp_path: Path) -> None:
    assert find_tokenizer(DataConfig(train=shard)) == "byte"
    prefix = str(tmp_path / "mine")
    tokenize([str(plays[0])], prefix, tokenizer=None, train_tokenizer=400)
    assert find_tokenizer(DataConfig(train=prefix)) == f"{prefix}.model"
    assert find_tokenizer(DataConfig(train=str(tmp_path))) == f"{prefix}.model", "of a directory of shards"
    streamed = SourceConfig(files=["a.txt"], tokenizer=f"{prefix}.model", weight=1.0)
    mixed = DataConfig(train=[SourceConfig(path=prefix, weight=1.0), streamed])
    assert find_tokenizer(mixed) == f"{prefix}.model"

    with pytest.raises(ValueError, match=r"different tokenizers, .*byte.*; give the tokenizer with"):
        find_tokenizer(DataConfig(train=[SourceConfig(path=shard), SourceConfig(path=prefix)]))
    model = tmp_path / "mine.model"
    content = model.read_bytes()
    model.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"mine\.model: expected the tokenizer of .*, with SHA-256"):
        find_tokenizer(DataConfig(train=prefix))
    model.unlink()
    with pytest.raises(ValueError, match=r"mine\.model: expected the tokenizer of .*, found no file; give the"):
        find_tokenizer(DataConfig(train=prefix))
    Path(f"{prefix}.json").unlink()
    with pytest.raises(ValueError, match=r"mine\.json: expected facts of a shard.*--tokenizer"):
        find_tokenizer(DataConfig(train=prefix))
