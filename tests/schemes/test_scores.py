"""What each score function promises: the first token, the size of queries, the length of the text."""

from collections.abc import Callable
from math import exp, log

import pytest
import torch
from entries import SCORE_CHOICES
from torch import Tensor

from nlm import SCORES
from nlm.anatomy import Span
from nlm.norms import unit
from nlm.parallel.tensor import TensorParallel
from nlm.scores import Heads, Score
from nlm.scores.base import CHUNK, PlacedScore, document_mask, linear_attention
from nlm.scores.sa_softmax import SASoftmax
from nlm.scores.softmax import SoftCap, TopK, softmax

HEADS, KV_HEADS, HEAD_DIM, SEQ_LEN = 4, 2, 8, 12


def make(name: str, seq_len: int = SEQ_LEN, **fields: object) -> Score:
    """In float64, at the values that it starts from."""
    spans = Span.whole(HEADS), Span.whole(KV_HEADS)
    score = SCORES[name](Heads(*spans, HEAD_DIM, seq_len, 1e-12, TensorParallel()), **fields).double()
    for module in score.modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            torch.nn.init.constant_(tensor, module.initial[parameter])  # type: ignore[index]
    return score


def qkv(seq_len: int = SEQ_LEN, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(2, seq_len, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def attend(score: Score, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return score(q, k, v, mask, lambda x: x, lambda x: x)  # type: ignore[no-any-return]


def label(choice: dict[str, object]) -> str:
    return "-".join(map(str, choice.values()))


@pytest.fixture(params=SCORE_CHOICES, ids=label)
def score(request: pytest.FixtureRequest) -> Score:
    return make(**{"name" if key == "score" else key: value for key, value in request.param.items()})


def test_k15_no_key_or_value_after_the_query_counts(score: Score) -> None:
    tensors = [x.requires_grad_() for x in qkv()]
    out = attend(score, *tensors)
    for gradient in torch.autograd.grad(out[0, 5].square().sum(), tensors):
        assert (gradient[0, 6:] == 0).all() and (gradient[1] == 0).all()
        assert gradient[0, :6].abs().max() > 0


def test_a_document_mask_is_a_text_of_its_own(score: Score) -> None:
    """What a second document sees is what it sees alone."""
    q, k, v = qkv()
    segments = torch.tensor([[0] * 5 + [1] * 7] * 2)
    masked = attend(score, q, k, v, document_mask(segments))
    assert torch.allclose(masked[:, :5], attend(score, q[:, :5], k[:, :5], v[:, :5]), atol=1e-12)
    assert torch.allclose(masked[:, 5:], attend(score, q[:, 5:], k[:, 5:], v[:, 5:]), atol=1e-12)


def shared(x: Tensor) -> Tensor:
    """[B S Hkv Dh] -> [B S H Dh]."""
    return x.repeat_interleave(HEADS // KV_HEADS, dim=2)


def layer_norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


FIRST: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    # q·k / sqrt(Dh), k and v of the first token -> what it gets
    "sa_softmax": lambda s, k, v: (s > 0) * v,
    "rela": lambda s, k, v: unit((s.relu() * v).flatten(1)) * (HEADS * HEAD_DIM) ** 0.5 / 2,
    "sigmoid": lambda s, k, v: (s - log(SEQ_LEN)).sigmoid() * v,
}


@pytest.mark.parametrize("name", [name for name in SCORES if name not in {"fourier", "galerkin"}])
def test_the_first_token_sees_itself_only(name: str) -> None:
    """Softmax, whatever its logits, gives it its own value; others scale or drop it."""
    q, k, v = qkv()
    s = (q[:, 0] * shared(k)[:, 0]).sum(-1, keepdim=True) * HEAD_DIM**-0.5  # [B H 1]
    expected = FIRST.get(name, lambda s, k, v: v)(s, shared(k)[:, 0], shared(v)[:, 0])
    assert torch.allclose(attend(make(name), q, k, v)[:, 0].flatten(1), expected.flatten(1), rtol=1e-2)


@pytest.mark.parametrize("name", SCORES)
def test_k13_what_the_length_of_queries_does(name: str) -> None:
    """Queries a thousand times as long: nothing where they, or what comes out, are normalized."""
    q, k, v = qkv()
    score = make(name)
    change = (attend(score, 100 * q, k, v) - attend(score, 0.1 * q, k, v)).abs().max()
    invariant = {"qknorm", "cosine", "rms_qknorm_head", "rms_qknorm_full", "fourier", "rela"}
    assert change < 1e-6 if name in invariant else change > 0.05


def weights_of(score: PlacedScore, q: Tensor, k: Tensor) -> Tensor:
    """[S S] of the first head: what values that name their key come out as."""
    names = torch.eye(q.shape[1], dtype=torch.float64)[None, :, None]
    return score.attend(q[:1, :, :1], k[:1, :, :1], names)[0, :, 0]


@pytest.mark.parametrize(("name", "low", "high"), [("softmax", 1, 1), ("sigmoid", 0.9, 1.8)])
def test_how_much_weight_a_text_of_the_context_length_has(name: str, low: float, high: float) -> None:
    seq_len = 256
    score = make(name, seq_len)
    assert isinstance(score, PlacedScore)
    total = weights_of(score, *qkv(seq_len)[:2])[-1].sum()
    assert low - 1e-9 <= total <= high + 1e-9


@pytest.mark.parametrize("name", ["rela", "fourier", "galerkin", "nalaformer"])
def test_a_text_four_times_as_long_does_not_grow_what_comes_out(name: str) -> None:
    """Σ over the keys is normed, or divided by their number."""
    score = make(name)
    short, long = (attend(score, *qkv(n))[:, -16:].square().mean().sqrt() for n in (64, 256))
    assert long < 1.1 * short


@pytest.mark.parametrize("seq_len", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 17])
def test_linear_attention_in_chunks_is_the_sum_over_all_pairs(seq_len: int) -> None:
    q, k, v = (shared(x) if x.shape[2] == KV_HEADS else x for x in qkv(seq_len))
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    assert torch.allclose(linear_attention(q, k, v, None), linear_attention(q, k, v, causal[None, None]), atol=1e-10)


def test_every_score_compiles_for_any_number_of_heads(score: Score) -> None:
    """As it does for pairs under FSDP, where the sizes of matrices are no numbers either."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *of: attend(score, *of), backend="eager", dynamic=True, fullgraph=True)
    for seq_len in (SEQ_LEN, 7):
        tensors = qkv(seq_len)
        torch.testing.assert_close(compiled(*tensors), attend(score, *tensors))


def test_top_k_keeps_k() -> None:
    q, k, v = qkv()
    few, all_ = make("top_k", k=3), make("top_k", k=SEQ_LEN)
    assert isinstance(few, TopK) and isinstance(all_, TopK)
    kept = weights_of(few, q, k) > 0
    assert kept.sum(-1).tolist() == [min(t + 1, 3) for t in range(SEQ_LEN)]
    assert torch.allclose(attend(all_, q, k, v), attend(make("softmax"), q, k, v))


def test_soft_cap_bounds_the_logits() -> None:
    q, k, v = qkv()
    capped, high = make("softcap", cap=2.0), make("softcap", cap=1e6)
    assert isinstance(capped, SoftCap)
    for t, row in enumerate(weights_of(capped, 1e3 * q, k).log()):
        assert row[: t + 1].max() - row[: t + 1].min() <= 2 * 2.0 + 1e-9
    assert torch.allclose(attend(high, q, k, v), attend(make("softmax"), q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, {5: 0.086, 10: 7e-4, 20: 3e-8}),
        ({"normalized": False}, {5: 1.33, 10: 1.01, 20: 1.00}),
        ({"normalized": True, "detach": False}, {5: 0.086, 10: 7e-4, 20: 3e-8}),
        ({"normalized": True, "detach": True}, {20: 0.05}),
    ],
    ids=["softmax", "times score", "released", "detached"],
)
def test_gradient_where_softmax_saturates(choice: dict[str, bool], expected: dict[int, float]) -> None:
    """One logit a above 15 zeros: |∂w/∂s| of its weight. SA-Softmax keeps it in the plain form, and normalized only if
    no gradient flows through minimum and maximum: the released code's own gradient is softmax's."""
    score = make("sa_softmax", **choice) if choice else None
    for a, slope in expected.items():
        s = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
        s[..., 0] = a
        s.requires_grad_()
        kept = torch.ones(1, 16, dtype=torch.bool)
        weights = score.weigh(s, kept) if isinstance(score, SASoftmax) else softmax(s, kept)
        (gradient,) = torch.autograd.grad(weights[0, 0, 0, 0], s)
        assert float(gradient[0, 0, 0, 0].abs()) == pytest.approx(slope, rel=0.15)


def test_a_detached_single_key_has_an_unbounded_gradient() -> None:
    """Of the first position: 1/|s|, where the released form has none."""
    for detach, expected in ((True, 1e3), (False, 0.0)):
        score = make("sa_softmax", detach=detach)
        s = torch.full((1, 1, 1, 1), 1e-3, dtype=torch.float64, requires_grad=True)
        assert isinstance(score, SASoftmax)
        (gradient,) = torch.autograd.grad(score.weigh(s, torch.ones(1, 1, dtype=torch.bool)).sum(), s)
        assert float(gradient) == pytest.approx(expected, abs=1e-3, rel=1e-3)


def test_rela_weights_are_sparse() -> None:
    """About half of random scores is below 0, and some queries see nothing."""
    score = make("rela")
    q, k, _ = qkv(256)
    s = torch.einsum("bshd,bthd->bhst", q, shared(k))
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    weights = score.weigh(s, causal)  # type: ignore[operator]
    assert (weights[..., causal] == 0).double().mean() == pytest.approx(0.5, abs=0.02)
    assert (weights.sum(-1) == 0).any()


def test_long_queries_attend_sharply_in_nalaformer() -> None:
    """Of queries of the same direction, the longer one has the lower entropy."""

    def entropy(length: float) -> float:
        q, k, _ = qkv()
        names = (
            torch.eye(SEQ_LEN, dtype=torch.float64).expand(2, SEQ_LEN, SEQ_LEN)[:, :, None].repeat(1, 1, KV_HEADS, 1)
        )
        weights = attend(make("nalaformer"), length * unit(q), k, names)[:, -1]
        return float(torch.special.entr(weights.clamp(min=0)).sum(-1).mean())

    assert entropy(0.1) > entropy(0.5) + 0.05 > entropy(2.0) + 0.1


def test_cosine_has_a_bounded_temperature_for_each_head() -> None:
    score = make("cosine")
    q, k, v = qkv()
    torch.nn.init.constant_(score.log_scale, 1e3)  # type: ignore[arg-type]
    hot = attend(score, q, k, v)
    assert torch.allclose(hot, attend(make("qknorm", g0=100.0), q, k, v)), "at most 100"
    assert score.log_scale.shape == (HEADS,) and exp(make("cosine").log_scale[0].item()) == pytest.approx(10)  # type: ignore[index]
