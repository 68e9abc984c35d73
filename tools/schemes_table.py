"""What was measured of every scheme, norm, score, weight norm and init: `python tools/schemes_table.py`.

Takes an hour of one core. What is found goes to docs/schemes.json, from which, and from docs/claims.json,
docs/schemes.md is written; nothing in either is written by hand. What is there is not measured again, but for
`--again PART …`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import log, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from entries import COMBINATIONS, ENCODERS, MIXED, combination
from parity import ENCODER_ROWS, MIXED_ROWS, MODEL, Row, prove, write_tokens
from transcription import difference

from nlm import NORMS, SCHEMES, SCORES, WEIGHT_NORMS, build_model
from nlm.build import build_engine, parse_config
from nlm.compare import differences
from nlm.config import Config, ConfigError
from nlm.data.rank import RankData
from nlm.mesh import Mesh
from nlm.model import Transformer
from nlm.parallel.compile import compile_model
from nlm.schemes.inits import INITS
from nlm.signals import Signals
from nlm.train import train

DOCS = Path(__file__).parents[1] / "docs"
Model = dict[str, Any]

REGISTRIES = {"schemes": SCHEMES, "norms": NORMS, "scores": SCORES, "weight_norms": WEIGHT_NORMS, "inits": INITS}
INIT_MODELS = {
    f"pre_ln-{name}": combination()[1] | {"init": {"name": name} | ({"base_dim": 16} if name == "mup" else {})}
    for name in INITS
}
MODELS = MIXED | ENCODERS | INIT_MODELS
"""In which every entry is, and in which layouts, compiler, precision and resume are tried."""
LAYOUTS = {"TP": "tp2", "PP": "pp2-1f1b", "FSDP": "fsdp2"}
DEPTH = 64


def config(model: Model, folder: Path, name: str = "run", **sections: Model) -> Config:
    """A small model on a play."""
    table: Model = {
        "model": MODEL | {"vocab_size": 259, "n_layers": 4} | model,
        "train": {"steps": 8, "batch_tokens": 128, "seq_len": 32},
        "optim": {"lr": 1e-3},
        "data": {"train": str(folder / "tokens")},
        "log": {"dir": str(folder / name), "every": 1, "tensorboard": False},
    }
    return parse_config(table | {key: table.get(key, {}) | keys for key, keys in sections.items()})


# What is measured, each of one model.


def equation(model: Model, folder: Path) -> str:
    """Logits against the independent transcription in numpy, relative to their spread, in float64."""
    return f"{difference(config(model, folder)):.0e}"


def compiled(model: Model, folder: Path) -> str:
    """Gradients of code that Inductor made against eager ones, relative to their norm, in float64."""
    return f"{compiled_difference(config(model | {'n_layers': 2}, folder)):.0e}"


def compiled_difference(config: Config, backend: str = "inductor") -> float:
    torch.compiler.reset()
    model = build_model(config).double()
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:  # off the values that hide a part which is not used, or used twice
            parameter += 0.3 * (parameter.abs().mean() + 0.1) * torch.randn(parameter.shape, generator=generator)
    tokens = torch.randint(config.model.n_tokens, (2, config.train.seq_len + 1), generator=generator)

    def gradients() -> list[torch.Tensor]:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]) / tokens[:, 1:].numel()
        return list(torch.autograd.grad(loss, parameters))

    eager = gradients()
    compile_model(model, backend)
    pairs = zip(eager, gradients(), strict=True)
    return max(float((a - b).norm() / (a.norm() + 1e-5)) for a, b in pairs)


def bf16(model: Model, folder: Path) -> str:
    """The loss after 8 steps in bf16 against float32, relative."""
    losses = []
    for precision in ("fp32", "bf16"):
        own = config(model, folder, train={"precision": precision})
        engine, data = build_engine(own, Mesh()), RankData(own, Mesh())
        for step in range(1, 9):
            loss = float(engine.total(engine.forward_backward(data.rows(step))))
            engine.clip()
            engine.update(1e-3)
        losses.append(loss)
    return f"{abs(losses[1] / losses[0] - 1):.0e}"


def resume(model: Model, folder: Path) -> str:
    """Losses, statistics, parameters and state after 4 steps, interrupted after the second: the largest difference."""
    with TemporaryDirectory() as scratch:
        steps = {"steps": 4, "batch_tokens": 128, "seq_len": 32}

        def run(name: str, **more: int) -> Path:
            own = config(model, folder, train=steps | more)
            return train(own.model_copy(update={"log": own.log.model_copy(update={"dir": f"{scratch}/{name}"})}))

        straight = run("straight")
        run("parts", stop_after=2)
        found = differences(straight, run("parts"))
    return f"{max(difference.size for difference in found.values()):.0e}"


def thousand(model: Model, folder: Path) -> str:
    """The loss of a batch of bytes at the first and the third step of 1,000 layers."""
    shape = {"n_layers": 1000, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 16, "vocab_size": 257}
    own = config(model | shape, folder, train={"batch_tokens": 64})
    engine, rows = build_engine(own, Mesh()), RankData(own, Mesh()).rows(1)
    losses = []
    for _ in range(3):
        losses.append(float(engine.total(engine.forward_backward(rows))))
        engine.clip()
        engine.update(1e-3)
    finite = all(bool(tensor.isfinite().all()) for tensor in engine.pieces.tensors)
    return f"{losses[0]:.2f} → {losses[-1]:.2f}" if finite else "not finite"


ROWS = MIXED_ROWS | ENCODER_ROWS
ROWS |= {name: Row(name, MODEL | {"n_layers": 4} | model, (), limit=1e-7) for name, model in INIT_MODELS.items()}


def in_layout(name: str, part: str, folder: Path) -> str:
    """The largest relative difference of five steps to one process, in float64, or why it is refused."""
    layout, microbatches = LAYOUTS[part], 1 if name in ENCODERS and part != "PP" else 4
    row = replace(ROWS[name], layouts=(layout,), everywhere={"microbatches": microbatches}, precision="fp64")
    try:
        row.config(folder, layout)
    except ConfigError as error:
        return f"refused: {error.problems[0].partition('; ')[0].partition(': ')[2]}"
    *_, found = prove([row])
    return found.text.split()[0] if found.good else found.text


# What the schemes say of their initialization, at 64 layers.


@dataclass(frozen=True)
class Start:
    """A new model of 64 layers, 64 channels and 4 heads, and the RMS [L 2 3] of what it makes of 2 x 64 bytes."""

    scheme: str
    model: Transformer
    rms: np.ndarray

    @classmethod
    def of(cls, scheme: str, folder: Path, n_layers: int = DEPTH, **keys: Any) -> "Start":
        shape = {"vocab_size": 257, "dim": 64, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 256, "activation": "gelu"}
        model = combination(scheme)[1] | shape | {"position": "learned", "n_layers": n_layers} | keys
        own = config(model, folder, train={"seq_len": 64, "batch_tokens": 128})
        built = build_model(own)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if name.endswith("skip_gain"):  # nf's branches as they are to be, which start at 0
                    parameter.fill_(1.0)
        built.signals = Signals(queries=1)
        built(RankData(own, Mesh()).rows(1).inputs)
        return cls(scheme, built, built.signals.rms().double().numpy())

    @property
    def variance(self) -> float:
        """Of the stream after the last layer."""
        return float(self.rms[-1, -1, -1] ** 2)

    def std(self, matrix: str) -> float:
        return float(self.model.get_parameter(f"blocks.0.{matrix}.weight").std())

    def kept(self) -> float:
        """How much the whole stack changes the size of the stream."""
        return float(self.rms[-1, -1, -1] / self.rms[0, 0, 0])

    def power(self, values: np.ndarray) -> float:
        """Of the layer's number, over the second half."""
        half, layers = len(values) // 2, np.arange(1, len(values) + 1)
        return float(np.polyfit(np.log(layers[half:]), np.log(values[half:]), 1)[0])


Claim = tuple[str, float, float]
"""What is claimed, the number expected, the number measured."""
AT_START: dict[str, Callable[[Start, Path], Claim]] = {
    "pre_ln": lambda s, _: ("power of the layer by which the variance grows", 1.0, s.power(s.rms[:, 1, 2] ** 2)),
    "post_ln": lambda s, _: ("variance after the last layer", 1.0, s.variance),
    "deepnorm": lambda s, _: ("std of V over Q: β", (8 * DEPTH) ** -0.25, s.std("attn.wv") / s.std("attn.wq")),
    "sub_ln": lambda s, _: ("std of V over Q: γ", sqrt(log(2 * DEPTH)), s.std("attn.wv") / s.std("attn.wq")),
    "peri_ln": lambda s, _: ("variance after the last layer: 1 + 2L", 1.0 + 2 * DEPTH, s.variance),
    "sandwich_ln": lambda s, _: ("variance after the last layer: 2L", 2.0 * DEPTH, s.variance),
    "normformer": lambda s, _: ("RMS of the attention branches", 1.0, float(s.rms[:, 0, 1].mean())),
    "olmo2": lambda s, _: ("variance after the last layer: 2L", 2.0 * DEPTH, s.variance),
    "without_tears": lambda s, _: ("std of Q: sqrt(2/5D)", sqrt(2 / (5 * 64)), s.std("attn.wq")),
    "ngpt": lambda s, _: ("length of the stream", 1.0, sqrt(64 * s.variance)),
    "layernorm_scaling": lambda s, _: (
        "power of the layer by which branches shrink",
        -0.5,
        s.power(s.rms[:, :, 1].mean(1)),
    ),
    "branch_scaled": lambda s, folder: (
        "RMS after 64 layers over that after 8",
        1.0,
        sqrt(s.variance / Start.of(s.scheme, folder, 8).variance),
    ),
    "layerscale": lambda s, _: ("RMS after the last layer over before the first", 1.0, s.kept()),
    "skipinit": lambda s, _: ("RMS after the last layer over before the first", 1.0, s.kept()),
    "rezero": lambda s, _: ("RMS after the last layer over before the first", 1.0, s.kept()),
    "fixup": lambda s, _: ("RMS after the last layer over before the first", 1.0, s.kept()),
    "t_fixup": lambda s, _: ("std of V over Q: 0.67 L^-¼", 0.67 * DEPTH**-0.25, s.std("attn.wv") / s.std("attn.wq")),
    "nf": lambda s, folder: (
        "variance after the last layer, branches on: 1 + 2L α²",
        1 + 2 * DEPTH * 0.2**2,
        Start.of(s.scheme, folder, position="rope").variance,
    ),
    "norm_free": lambda s, _: ("std of O and all others", 0.02, s.std("attn.wo")),
    "brainformer": lambda s, _: (
        "share of attention among sublayers",
        0.25,
        float(np.mean([name == "attn" for block in s.model.blocks.values() for name in block.names])),  # type: ignore[union-attr]
    ),
}
NEAR = 0.25
"""How far from what is expected still counts as that, relative: branches are not quite independent (K8)."""


def at_start(scheme: str, folder: Path) -> str:
    """What the scheme says of its initialization at 64 layers: expected, measured."""
    if scheme not in AT_START:
        return "none stated"
    claim, expected, measured = AT_START[scheme](Start.of(scheme, folder), folder)
    holds = abs(measured - expected) <= NEAR * abs(expected)
    return f"{claim}: {expected:.3g}, measured {measured:.3g}" + ("" if holds else ": **not so**")


# The table.

PARTS: dict[str, tuple[Iterable[str], Callable[[str, Path], str]]] = {
    "equation": (COMBINATIONS, lambda name, folder: equation(COMBINATIONS[name], folder)),
    "start": (SCHEMES, at_start),
    "1,000 layers": (SCHEMES, lambda name, folder: thousand(combination(name)[1], folder)),
    "TP": (MODELS, lambda name, folder: in_layout(name, "TP", folder)),
    "PP": (MODELS, lambda name, folder: in_layout(name, "PP", folder)),
    "FSDP": (MODELS, lambda name, folder: in_layout(name, "FSDP", folder)),
    "compile": (MODELS, lambda name, folder: compiled(MODELS[name], folder)),
    "bf16": (MODELS, lambda name, folder: bf16(MODELS[name], folder)),
    "resume": (MODELS, lambda name, folder: resume(MODELS[name], folder)),
}
"""Of what, and how."""


def models_of(registry: str, entry: str) -> list[str]:
    """Names of the models that have the entry."""

    def chosen(model: Model) -> Any:
        keys = {
            "schemes": "scheme",
            "norms": "norm",
            "scores": "attention",
            "weight_norms": "weight_norm",
            "inits": "init",
        }
        choice = model.get(keys[registry], {})
        return choice if isinstance(choice, str) else choice.get("score" if registry == "scores" else "name")

    everything = COMBINATIONS | MODELS
    return [name for name, model in everything.items() if chosen(model) == entry]


def cell(found: dict[str, dict[str, str]], part: str, registry: str, entry: str) -> str:
    """The worst of the models that have the entry."""
    here = found.get(part, {})
    if part in {"start", "1,000 layers"}:
        return here.get(entry, "not measured")
    values = [here[name] for name in models_of(registry, entry) if name in here]
    refused = [value for value in values if value.startswith("refused")]
    numbers = [value for value in values if value[0].isdigit()]
    if failed := set(values) - {*refused, *numbers}:
        return f"**{failed.pop()}**"
    return max(numbers, key=float) if numbers else (refused or ["not measured"])[0]


def claims(registry: str, entry: str, found: list[dict[str, Any]]) -> str:
    own = [claim for claim in found if (claim["registry"], claim["entry"]) == (registry, entry)]
    words = {"reproduced": "yes"}
    return "<br>".join(
        f"[{words.get(c['verdict'], c['verdict'])}](../tools/reproduce/{c['script']}.py): {c['measured']}" for c in own
    )


HEAD = """# Every scheme, norm, score, weight norm and init, measured

Generated by `python tools/schemes_table.py` and `python -m tools.reproduce`; no number is written by hand.

- **equation**: largest difference of logits to an independent transcription of the papers' equations in numpy
  ([transcription.py](../tools/transcription.py)), relative to their spread, in float64.
- **at initialization**: what the scheme says of itself, at 64 layers: expected, measured; *not so* beyond {near:.0%}.
- **1,000 layers**: loss of a batch of bytes at the first and the third step on it; all parameters are finite after.
- **TP**, **PP**, **FSDP**: two ranks against one process after five steps, in losses, gradient norms, statistics of
  every layer, parameters and optimizer state: the largest relative difference, in float64 (statistics are stored in
  float32).
- **compile**: gradients of Inductor's code against eager ones, relative to their norm, in float64.
- **bf16**: the loss after 8 steps against float32's, relative.
- **resume**: as of TP, of 4 steps interrupted after the second against 4 without.
- **claim**: is what the paper says seen in small models? The numbers are explained in [claims.md](claims.md).

Equations were tried in {combinations} models; TP to resume in the {mixed} of [entries.py](../tools/entries.py), each of
which mixes a scheme, a norm, a score and perhaps a weight norm, and inits in Pre-LN. A cell has the worst of the models
that have the entry.
"""
TITLES = {"schemes": "Schemes", "norms": "Norms", "scores": "Scores", "weight_norms": "Weight norms", "inits": "Inits"}


def document(found: dict[str, dict[str, str]], checked: list[dict[str, Any]]) -> Iterator[str]:
    yield HEAD.format(near=NEAR, combinations=len(COMBINATIONS), mixed=len(MIXED | ENCODERS))
    for registry, entries in REGISTRIES.items():
        parts = [part for part in PARTS if registry == "schemes" or part not in {"start", "1,000 layers"}]
        parts = [part for part in parts if registry != "inits" or part != "equation"]
        titles = ["at initialization" if part == "start" else part for part in parts]
        yield f"## {TITLES[registry]}\n"
        yield "| | " + " | ".join([*titles, "claim"]) + " |"
        yield "|---" * (len(parts) + 2) + "|"
        for entry in entries:
            cells = [cell(found, part, registry, entry) for part in parts]
            yield f"| `{entry}` | " + " | ".join([*cells, claims(registry, entry, checked) or "none checked"]) + " |"
        yield ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="+", default=[], choices=PARTS, metavar="PART", help=", ".join(PARTS))
    again = parser.parse_args().again
    torch.set_num_threads(1)
    path = DOCS / "schemes.json"
    found: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with TemporaryDirectory() as scratch:
        write_tokens(Path(scratch))
        for part, (names, measure) in PARTS.items():
            cells = found.setdefault(part, {})
            for name in names:
                if part in again or name not in cells:
                    cells[name] = measure(name, Path(scratch))
                    print(f"{part}, {name}: {cells[name]}", file=sys.stderr, flush=True)
                    text = json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True)
                    path.write_text(text + "\n", encoding="utf-8")
    checked = json.loads((DOCS / "claims.json").read_text(encoding="utf-8"))
    (DOCS / "schemes.md").write_text("\n".join(document(found, checked)).rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
