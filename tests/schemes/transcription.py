"""The models once more, from the papers' equations, in numpy and float64: what nlm's logits are compared with.

Nothing here is shared with nlm but the names of the parameters and the config. Written to be read beside the
papers: one position, one head, one equation at a time.
"""

from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

from nlm.config import ModelConfig

Array = NDArray[np.float64]

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(erf)(x / sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
ACTIVATIONS |= {"swiglu": ACTIVATIONS["silu"], "geglu": ACTIVATIONS["gelu"]}


def unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


class Transcription:
    def __init__(self, parameters: dict[str, Array], model: ModelConfig) -> None:
        self.p, self.model, self.scheme = parameters, model, model.scheme.name

    def logits(self, tokens: NDArray[np.int64]) -> Array:
        """tokens [B S] -> [B S V]."""
        return np.stack([self.sequence(row) for row in tokens])

    def sequence(self, tokens: NDArray[np.int64]) -> Array:
        x = self.p["embed.weight"][tokens]  # [S D]
        positions = np.arange(len(tokens))
        if self.model.position == "learned":
            x = x + self.p["position.weight"][positions]
        if self.model.position == "sinusoidal":
            for i in range(0, self.model.dim, 2):
                x[:, i] += np.sin(positions / 10000 ** (i / self.model.dim))
                x[:, i + 1] += np.cos(positions / 10000 ** (i / self.model.dim))
        if self.scheme == "peri_ln":
            x = self.norm("stem", x)
        for layer in range(self.model.n_layers):
            for kind in ("attn", "ffn"):
                x = self.sublayer(f"blocks.{layer}.{kind}", x)
        if self.scheme in {"pre_ln", "sub_ln", "peri_ln", "normformer"}:
            x = self.norm("final", x)
        logits = x @ self.p["embed.weight" if self.model.tied else "head.weight"].T
        if self.scheme == "ngpt":
            logits = logits * self.p["logits.s"] * sqrt(self.model.dim)
        return logits

    def sublayer(self, at: str, x: Array) -> Array:
        f = self.attention if at.endswith("attn") else self.feed_forward
        residual, n_layers = f"{at}_residual", self.model.n_layers
        match self.scheme, at.rpartition(".")[2]:
            case ("pre_ln" | "sub_ln", _) | ("normformer", "ffn"):
                return x + f(at, self.norm(f"{residual}.norm", x))
            case "post_ln", _:
                return self.norm(f"{residual}.norm", x + f(at, x))
            case "deepnorm", _:
                return self.norm(f"{residual}.norm", (2 * n_layers) ** 0.25 * x + f(at, x))
            case ("peri_ln", _) | ("normformer", "attn"):
                return x + self.norm(f"{residual}.norm_out", f(at, self.norm(f"{residual}.norm_in", x)))
            case "ngpt", _:
                alpha = np.abs(self.p[f"{residual}.alpha"] * min(0.05, 1 / n_layers) * sqrt(self.model.dim))
                h = unit(x)
                return unit(h + alpha * (unit(f(at, h)) - h))
        raise AssertionError(f"no transcription of {self.scheme}: write one")

    def attention(self, at: str, x: Array) -> Array:
        n_heads, n_kv_heads, score = self.model.n_heads, self.model.n_kv_heads, self.model.attention.score
        q, k, v = (self.linear(f"{at}.w{name}", x) for name in "qkv")  # [S H·Dh]
        if score == "rms_qknorm_full":
            q, k = self.rms(f"{at}.score.q_norm", q), self.rms(f"{at}.score.k_norm", k)
        queries, keys, values = np.split(q, n_heads, -1), np.split(k, n_kv_heads, -1), np.split(v, n_kv_heads, -1)
        heads = []
        for h in range(n_heads):
            shared = h // (n_heads // n_kv_heads)
            q, k, v = queries[h], keys[shared], values[shared]  # [S Dh]
            if score == "rms_qknorm_head":
                q, k = self.rms(f"{at}.score.q_norm", q), self.rms(f"{at}.score.k_norm", k)
            q, k, scale = self.rope(q), self.rope(k), 1 / sqrt(self.model.head_dim)
            if self.scheme == "ngpt":
                s = self.p[f"{at}.slots.q.s_qk"][h] * sqrt(self.model.dim)
                # On both sides in the paper; before a cosine, where that differs, it is all on the query.
                q, k, scale = s * s * unit(q), unit(k), sqrt(self.model.head_dim)
            if score == "qknorm":
                q, k, scale = unit(q), unit(k), self.p[f"{at}.score.g"].item()
            out = np.empty_like(v)
            for t in range(len(x)):
                weight = np.exp(scale * (k[: t + 1] @ q[t]))
                out[t] = weight @ v[: t + 1] / weight.sum()
            if self.scheme == "normformer":
                out = out * self.p[f"{at}.slots.heads.scale"][h]
            heads.append(out)
        joined = np.concatenate(heads, -1)
        if self.scheme == "sub_ln":
            joined = self.norm(f"{at}.slots.heads", joined)
        return self.linear(f"{at}.wo", joined)

    def feed_forward(self, at: str, x: Array) -> Array:
        act = ACTIVATIONS[self.model.activation]
        up = self.linear(f"{at}.w_up", x)
        gate = self.linear(f"{at}.w_gate", x) if f"{at}.w_gate.weight" in self.p else None
        if self.scheme == "ngpt":
            up = up * self.p[f"{at}.slots.up.s"] * sqrt(self.model.dim)
            gate = gate if gate is None else gate * self.p[f"{at}.slots.gate.s"] * sqrt(self.model.dim)
        hidden = act(up) if gate is None else act(gate) * up
        if self.scheme in {"sub_ln", "normformer"}:
            hidden = self.norm(f"{at}.slots.hidden", hidden)
        return self.linear(f"{at}.w_down", hidden)

    def rope(self, x: Array) -> Array:
        """[S Dh]: the pair i of position t as a complex number times exp(i t θ_i)."""
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
        return x @ self.p[f"{at}.weight"].T + self.p.get(f"{at}.bias", 0.0)

    def norm(self, at: str, x: Array) -> Array:
        if self.model.norm == "rmsnorm":
            return self.rms(at, x)
        assert self.model.norm == "layernorm", f"no transcription of {self.model.norm}: write one"
        centred = x - x.mean(-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.model.norm_eps)
        return normal * self.p[f"{at}.weight"] + self.p.get(f"{at}.bias", 0.0)

    def rms(self, at: str, x: Array) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.model.norm_eps) * self.p[f"{at}.weight"]
