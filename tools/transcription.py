"""The models once more, from the papers' equations, in numpy and float64: what nlm's logits are compared with.

Nothing here is shared with nlm but the names of the parameters and the config. Written to be read beside the
papers: one position, one head, one equation at a time.
"""

from functools import cache
from math import erf, exp, log, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from nlm.build import design
from nlm.config import Config, ModelConfig
from nlm.init import init
from nlm.norms.batch import BatchStatistics
from nlm.weight_norms import Singular

Array = NDArray[np.float64]

BLOCK_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
BRAINFORMER = (("attn", "ffn"), ("ffn", "attn"), ("ffn", "ffn_2"), ("ffn", "ffn_2"))
FINAL_NORM = {
    *("pre_ln", "sub_ln", "peri_ln", "normformer", "sandwich_ln", "olmo2", "without_tears"),
    *("layernorm_scaling", "layerscale", "branch_scaled", "norm_free", "brainformer"),
}


def mean_square(x: Array) -> Array:
    return (x**2).mean(-1, keepdims=True)


def length(x: Array) -> Array:
    return np.sqrt((x**2).sum(-1, keepdims=True))


def unit(x: Array) -> Array:
    """A vector of length 0, which has no direction, stays."""
    return x / np.maximum(length(x), 1e-12)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(erf)(x / sqrt(2))),
    "relu": relu,
    "relu2": lambda x: relu(x) ** 2,
    "silu": lambda x: x * sigmoid(x),
}
ACTIVATIONS |= {"swiglu": ACTIVATIONS["silu"], "geglu": ACTIVATIONS["gelu"]}


@cache
def spread(activation: str, gated: bool) -> float:
    """The standard deviation of act(z), z ~ N(0, 1), or of act(z) · u with an independent u ~ N(0, 1)."""
    z = np.linspace(-10, 10, 100_001)
    density, y = np.exp(-(z**2) / 2), ACTIVATIONS[activation](z)
    mean = 0.0 if gated else np.average(y, weights=density)
    return sqrt(np.average(y**2, weights=density) - mean**2)


class Transcription:
    """`seq_len` and `source_len` are those of the training, which some equations know."""

    def __init__(
        self, parameters: dict[str, Array], model: ModelConfig, *, seq_len: int, source_len: int | None = None
    ) -> None:
        self.p, self.model, self.scheme = parameters, model, model.scheme.name
        self.lengths = {"": seq_len, "encoder.": source_len}
        self.stack, self.memory = "", None
        self.weight_norm = getattr(model, "weight_norm", None)
        assert self.scheme != "nf" or self.weight_norm is None, "no transcription of nf with a weight norm: write one"

    def logits(self, tokens: NDArray[np.int64], source: NDArray[np.int64] | None = None) -> Array:
        """tokens [B S], of an encoder–decoder with sources [B T] -> [B S V]."""
        if source is None:
            return np.stack([self.sequence(row) for row in tokens])
        return np.stack([self.pair(*rows) for rows in zip(tokens, source, strict=True)])

    def pair(self, target: NDArray[np.int64], source: NDArray[np.int64]) -> Array:
        """What fills a source is not there."""
        self.stack = "encoder."
        self.memory = self.stream(source[source != self.model.vocab_size - 1])
        self.stack = ""
        return self.sequence(target)

    def stream(self, tokens: NDArray[np.int64]) -> Array:
        """Through one stack, [S] -> [S D]."""
        x = self.embedding(tokens)
        if self.scheme == "peri_ln":
            x = self.norm(f"{self.stack}stem", x)
        sublayers = self.sublayers()
        for n, at in enumerate(sublayers):
            x = self.sublayer(n, at, x)
        if self.scheme in FINAL_NORM:
            x = self.norm(f"{self.stack}final", x)
        return x / self.predicted_std(len(sublayers)) if self.scheme == "nf" else x

    def sequence(self, tokens: NDArray[np.int64]) -> Array:
        x = self.stream(tokens)
        head = self.matrix("embed" if self.model.tied else "head")
        if self.scheme == "without_tears":
            head = unit(head)
        logits = x @ head.T + self.p.get("head.bias", 0.0)
        if self.scheme == "ngpt":
            logits = logits * self.p["logits.s"] * sqrt(self.model.dim)
        if cap := getattr(self.model, "logits_cap", None):
            logits = cap * np.tanh(logits / cap)
        return logits

    def embedding(self, tokens: NDArray[np.int64]) -> Array:
        x = self.matrix("embed")[tokens]
        if self.scheme == "without_tears":
            x = sqrt(self.model.dim) * unit(x)
        elif self.scheme == "t_fixup":
            x = sqrt(self.model.dim) * x
        elif self.model.norm.name in {"dyt", "eln", "dyisru"}:
            x = self.p["token.scale"] * x
        positions = np.arange(len(tokens))
        if self.model.position == "learned":
            x = x + self.p[f"{self.stack}position.weight"][positions]
        if self.model.position == "sinusoidal":
            for i in range(0, self.model.dim, 2):
                x[:, i] += np.sin(positions / 10000 ** (i / self.model.dim))
                x[:, i + 1] += np.cos(positions / 10000 ** (i / self.model.dim))
        return x

    def sublayers(self) -> list[str]:
        period = BRAINFORMER if self.scheme == "brainformer" else (("attn", "ffn"),)
        if self.memory is not None and not self.stack:
            period = (("attn", "cross", "ffn"),)
        return [f"{self.stack}blocks.{l}.{kind}" for l in range(self.n_layers) for kind in period[l % len(period)]]

    @property
    def n_layers(self) -> int:
        return self.model.n_encoder_layers if self.stack else self.model.n_layers

    @property
    def alpha(self) -> float:
        """Of DeepNorm, by the table in its figure 2: M layers of a decoder, N of an encoder."""
        M, N = self.model.n_layers, getattr(self.model, "n_encoder_layers", None)
        if N is None:
            return (2 * M) ** (1 / 4)
        return 0.81 * (N**4 * M) ** (1 / 16) if self.stack else (3 * M) ** (1 / 4)

    def sublayer(self, n: int, at: str, x: Array) -> Array:
        """The sublayer `at`, with n before it."""
        residual, l, L = f"{at}_residual", n // 2 + 1, self.n_layers

        def f(h: Array) -> Array:
            if at.endswith("cross"):
                return self.attention(at, h, self.memory)
            return self.attention(at, h) if at.endswith("attn") else self.feed_forward(at, h)

        def norm(h: Array, name: str = "norm") -> Array:
            return self.norm(f"{residual}.{name}", h)

        def own(name: str) -> Array:
            return self.p[f"{residual}.{name}"]

        match self.scheme, at.rpartition(".")[2]:
            case ("pre_ln" | "sub_ln" | "without_tears" | "brainformer", _) | ("normformer", "ffn" | "cross"):
                return x + f(norm(x))
            case "post_ln", _:
                return norm(x + f(x))
            case "deepnorm", _:
                return norm(self.alpha * x + f(x))
            case ("peri_ln" | "sandwich_ln", _) | ("normformer", "attn"):
                return x + norm(f(norm(x, "norm_in")), "norm_out")
            case "olmo2", _:
                return x + norm(f(x))
            case "layernorm_scaling", _:
                return x + f(norm(x) / sqrt(l))
            case "layerscale", _:
                return x + own("gamma") * f(norm(x))
            case "branch_scaled", _:
                return x + f(norm(x)) / sqrt(2 * L)
            case "norm_free" | "t_fixup", _:
                return x + f(x)
            case "rezero", _:
                return x + self.p[f"{at.rpartition('.')[0]}.attn_residual.alpha"] * f(x)
            case "skipinit", _:
                return x + own("alpha") * f(x)
            case "fixup", _:
                return x + own("scale") * f(x + own("shift"))
            case "nf", _:
                return x + self.nf_alpha * own("skip_gain") * f(x / self.predicted_std(n))
            case "ngpt", _:
                rate = self.model.scheme.fields.get("alpha", min(0.05, 1 / L))
                alpha = np.abs(own("alpha") * rate * sqrt(self.model.dim))
                h = unit(x)
                return unit(h + alpha * (unit(f(h)) - h))
        raise AssertionError(f"no transcription of {self.scheme}: write one")

    @property
    def nf_alpha(self) -> float:
        return self.model.scheme.fields.get("alpha", 0.2)

    def predicted_std(self, n: int) -> float:
        """Of nf's stream after n sublayers, each of which adds the variance α² to the 1 of the embedding."""
        return sqrt(1 + self.nf_alpha**2 * n)

    def attention(self, at: str, x: Array, memory: Array | None = None) -> Array:
        """To x itself, or to all of a memory, without positions."""
        self.crosses = memory is not None
        n_heads, n_kv_heads, score = self.model.n_heads, self.model.n_kv_heads, self.model.attention.score
        read = x if memory is None else memory
        q, k, v = (self.linear(f"{at}.w{name}", y) for name, y in zip("qkv", (x, read, read), strict=True))
        # [S H·Dh]
        if score == "rms_qknorm_full":
            q, k = self.rms(f"{at}.score.q_norm", q), self.rms(f"{at}.score.k_norm", k)
        queries, keys, values = np.split(q, n_heads, -1), np.split(k, n_kv_heads, -1), np.split(v, n_kv_heads, -1)
        heads = []
        for h in range(n_heads):
            shared = h // (n_heads // n_kv_heads)
            heads.append(self.head(at, h, shared, queries[h], keys[shared], values[shared]))
        z = np.concatenate(heads, -1)
        if score == "rela":
            z = self.rms(f"{at}.score.norm", z) * sigmoid(self.p[f"{at}.score.gate"] * z)
        if self.scheme == "normformer" and not self.crosses:
            z = z * np.repeat(self.p[f"{at}.slots.heads.scale"], self.model.head_dim)
        if self.scheme == "sub_ln" and not self.crosses:
            z = self.norm(f"{at}.slots.heads", z)
        return self.linear(f"{at}.wo", z)

    def head(self, at: str, h: int, shared: int, q: Array, k: Array, v: Array) -> Array:
        """The head h, whose k and v are the `shared`-th, all [S Dh]."""
        score, scale = self.model.attention.score, 1 / sqrt(self.model.head_dim)
        match score:
            case "rms_qknorm_head":
                q, k = self.rms(f"{at}.score.q_norm", q), self.rms(f"{at}.score.k_norm", k)
            case "fourier":
                q, k = self.head_norm(f"{at}.score.q_norm", h, q), self.head_norm(f"{at}.score.k_norm", shared, k)
            case "galerkin":
                k, v = self.head_norm(f"{at}.score.k_norm", shared, k), self.head_norm(f"{at}.score.v_norm", shared, v)
        if score == "nalaformer":
            return self.nalaformer(at, h, q, k, v)
        q, k = self.placed_query(at, h, q), self.placed_key(k)
        match score:
            case "qknorm":
                q, k, scale = unit(q), unit(k), self.p[f"{at}.score.g"].item()
            case "cosine":
                q, k, scale = unit(q), unit(k), exp(min(self.p[f"{at}.score.log_scale"][h], log(100)))
            case "galerkin":
                scale = 1.0
        out = np.empty_like(q)
        for t in range(len(q)):
            seen = self.seen(t, len(k))
            out[t] = self.weights(scale * (k[:seen] @ q[t])) @ v[:seen]
        return out

    def seen(self, t: int, n: int) -> int:
        """How many of n positions the position t sees, from the first on."""
        return n if self.model.is_encoder or self.stack or self.crosses else t + 1

    def weights(self, s: Array) -> Array:
        """What one query gives the values of the keys that it sees, by their scores."""
        fields = self.model.attention.fields
        match self.model.attention.score:
            case "softmax" | "qknorm" | "rms_qknorm_full" | "rms_qknorm_head" | "cosine":
                return softmax(s)
            case "rela":
                return relu(s)
            case "sa_softmax" if fields.get("normalized", True):
                low, high = min(s.min(), 0), max(s.max(), 0)
                return softmax(s) * (s - low) / (high - low + 1e-10)
            case "sa_softmax":
                return softmax(s) * s
            case "top_k":
                largest = np.argsort(s)[-fields.get("k", 16) :]
                weights = np.zeros_like(s)
                weights[largest] = softmax(s[largest])
                return weights
            case "fourier" | "galerkin":  # (q kᵀ) v = q (kᵀ v)
                return s / len(s)
            case "softcap":
                cap = fields.get("cap", 50.0)
                return softmax(cap * np.tanh(s / cap))
            case "sigmoid":
                return sigmoid(s + fields.get("bias", -log(self.lengths["encoder." if self.crosses else self.stack])))
        raise AssertionError(f"no transcription of {self.model.attention.score}: write one")

    def placed_query(self, at: str, h: int, q: Array) -> Array:
        if self.scheme != "ngpt":
            return self.rope(q)
        s = self.p[f"{at}.slots.q.s_qk"][h] * sqrt(self.model.dim)
        # On both sides in the paper, and times sqrt(Dh) in the end; here all is on the query, before other scores too.
        return s * s * unit(self.rope(q)) * self.model.head_dim

    def placed_key(self, k: Array) -> Array:
        return unit(self.rope(k)) if self.scheme == "ngpt" else self.rope(k)

    def nalaformer(self, at: str, h: int, q: Array, k: Array, v: Array) -> Array:
        """Positive and negative parts are features of their own; positions turn them above the fraction bar only."""
        power = 3 * (0.5 + np.tanh(length(q)))
        features_q = [(relu(sign * q) / length(q)) ** power for sign in (1, -1)]
        features_k = [relu(sign * k**3) for sign in (1, -1)]
        turned_q = [self.placed_query(at, h, part) for part in features_q]
        turned_k = [self.placed_key(part) for part in features_k]
        out = np.empty_like(q)
        for t in range(len(q)):
            seen = self.seen(t, len(k))
            above = sum(keys[:seen] @ query[t] for query, keys in zip(turned_q, turned_k, strict=True))
            below = sum(keys[:seen] @ query[t] for query, keys in zip(features_q, features_k, strict=True))
            out[t] = above @ v[:seen] / seen / (below.mean() + 1e-6)
        return out

    def feed_forward(self, at: str, x: Array) -> Array:
        act = ACTIVATIONS[self.model.activation]
        up = self.linear(f"{at}.w_up", x)
        gate = self.linear(f"{at}.w_gate", x) if self.model.gated else None
        if self.scheme == "ngpt":
            up = up * self.p[f"{at}.slots.up.s"] * sqrt(self.model.dim)
            gate = gate if gate is None else gate * self.p[f"{at}.slots.gate.s"] * sqrt(self.model.dim)
        if self.scheme == "fixup":
            up = up + self.p[f"{at}.slots.up.shift"]
            gate = gate if gate is None else gate + self.p[f"{at}.slots.gate.shift"]
        hidden = act(up) if gate is None else act(gate) * up
        if self.scheme in {"sub_ln", "normformer"}:
            hidden = self.norm(f"{at}.slots.hidden", hidden)
        if self.scheme == "fixup":
            hidden = hidden + self.p[f"{at}.slots.hidden.shift"]
        if self.scheme == "nf":
            hidden = hidden / spread(self.model.activation, self.model.gated)
        return self.linear(f"{at}.w_down", hidden)

    def rope(self, x: Array) -> Array:
        """[S Dh]: the pair i of position t as a complex number times exp(i t θ_i)."""
        if self.crosses:
            return x
        half = self.model.head_dim // 2
        if self.model.position == "rope":
            first, second = np.arange(half), np.arange(half) + half
        elif self.model.position == "rope_interleaved":
            first, second = np.arange(0, 2 * half, 2), np.arange(1, 2 * half, 2)
        else:
            return x
        angles = np.outer(np.arange(len(x)), self.model.rope_base ** (-np.arange(half) / half))
        turned = (x[:, first] + 1j * x[:, second]) * np.exp(1j * angles)
        y = np.empty_like(x)
        y[:, first], y[:, second] = turned.real, turned.imag
        return y

    def linear(self, at: str, x: Array) -> Array:
        return x @ self.matrix(at).T + self.p.get(f"{at}.bias", 0.0)

    def matrix(self, at: str) -> Array:
        """[out in], as it enters the product: a row is what one output reads."""
        w, gain = self.p[f"{at}.weight"], f"{at}.weight_norm.gain"
        match self.weight_norm_of(at.rpartition(".")[2].removeprefix("w_").removeprefix("w")):
            case None | "norm_loss" | "spectral_regularization":  # these act on the updates
                return w
            case "weight_norm":
                return self.p[gain][:, None] * unit(w)
            case "spectral":
                return self.p[gain] * w / np.linalg.svd(w, compute_uv=False)[0]
            case "weight_standardization":
                return (w - w.mean(-1, keepdims=True)) / (w.std(-1, keepdims=True, ddof=1) + 1e-5)
            case "scaled_weight_standardization":
                energy = w.var(-1, keepdims=True) * w.shape[1]
                return self.p[gain][:, None] * (w - w.mean(-1, keepdims=True)) / np.sqrt(np.maximum(energy, 1e-4))
            case "weight_conditioning":
                return unit(w)
            case unknown:
                raise AssertionError(f"no transcription of {unknown}: write one")

    def weight_norm_of(self, role: str) -> str | None:
        if self.scheme == "nf":
            return "scaled_weight_standardization" if role in BLOCK_MATRICES else None
        if self.weight_norm is None:
            return None
        roles = BLOCK_MATRICES if self.weight_norm.roles is None else self.weight_norm.roles
        return self.weight_norm.name if role in roles else None

    def norm(self, at: str, x: Array) -> Array:
        fields, eps, C = self.model.norm.fields, self.model.norm_eps, x.shape[-1]
        match self.model.norm.name:
            case "layernorm":
                y = self.standardized(x)
            case "rmsnorm" if fields.get("eps_outside", False):
                y = x / (np.sqrt(mean_square(x)) + eps)
            case "rmsnorm":
                y = x / np.sqrt(mean_square(x) + eps)
            case "prmsnorm":
                y = x / np.sqrt(mean_square(x[:, : max(1, int(C * fields.get("p", 0.0625)))]) + eps)
            case "scalenorm":
                return self.p[f"{at}.g"] * x / np.maximum(length(x), eps)
            case "dyt":
                y = np.tanh(self.p[f"{at}.alpha"] * x)
            case "eln":
                y = sqrt(C - 1) * x / np.sqrt(np.exp(self.p[f"{at}.log_beta"]) + x**2)
            case "dyisru":
                y = sqrt(C) * x / np.sqrt(x**2 + np.exp(self.p[f"{at}.log_beta"]))
            case "powernorm":
                y = x / np.sqrt(mean_square(x) + eps) / np.sqrt(self.p[f"{at}.phi"] + eps)
            case "unified" if self.model.is_encoder:
                y = x / np.sqrt(self.p[f"{at}.rho"] + eps)
            case "unified":
                product = self.p[f"{at}.m0"] * self.p[f"{at}.m1"] * self.p[f"{at}.m2"] * self.p[f"{at}.m3"]
                y = x / np.sqrt(product**0.25 + eps)
            case "batchnorm":
                y = (x - self.p[f"{at}.mean"]) / np.sqrt(self.p[f"{at}.var"] + eps)
            case "frozen_layernorm":
                y = x - x.mean(-1, keepdims=True)
            case "frozen_rmsnorm":
                y = x
            case "none":
                return x
            case unknown:
                raise AssertionError(f"no transcription of {unknown}: write one")
        if not fields.get("gain", True):
            return y
        weight = self.p[f"{at}.weight"] + (1 if fields.get("one_plus", False) else 0)
        return y * weight + self.p.get(f"{at}.bias", 0.0)

    def head_norm(self, at: str, h: int, x: Array) -> Array:
        """LayerNorm of one head, with its own weight and bias."""
        return self.standardized(x) * self.p[f"{at}.weight"][h] + self.p[f"{at}.bias"][h]

    def standardized(self, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(mean_square(centred) + self.model.norm_eps)

    def rms(self, at: str, x: Array) -> Array:
        return x / np.sqrt(mean_square(x) + self.model.norm_eps) * self.p[f"{at}.weight"]


def difference(config: Config) -> float:
    """Largest difference in logits, relative to their spread, of a model whose parameters have all been moved."""
    model = init(design(config).double().to_empty(device="cpu"), config.train.seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * (parameter.abs().mean() + 0.1) * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(norm := getattr(module, "weight_norm", None), Singular):
                left, _, right = torch.linalg.svd(module.weight)
                norm.u.copy_(left[:, 0])
                norm.v.copy_(right[0])
            if isinstance(module, BatchStatistics):  # as after some steps
                for name in module.state:
                    getattr(module, name).uniform_(0.5, 2.0, generator=generator)
    model.eval()
    parameters = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(config.model.n_tokens, (2, config.train.seq_len), generator=generator)
    read, source_len = (tokens,), getattr(config, "source_len", None)
    if config.model.architecture == "encoder_decoder":
        source = torch.randint(config.model.n_tokens, (2, source_len), generator=generator)
        source[1, source_len // 2 :] = config.model.padding
        read = tokens, source
    ours = model(*read).detach().numpy()
    transcription = Transcription(parameters, config.model, seq_len=config.train.seq_len, source_len=source_len)
    theirs = transcription.logits(*(rows.numpy() for rows in read))
    return float(np.abs(ours - theirs).max() / theirs.std())
