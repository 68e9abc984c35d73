"""Depth in two stacks: `python tools/two_stacks.py --layers 500` takes some steps of an encoder and a decoder of so
many layers each, 2,500 sublayers in all, on sources to be copied, and prints what schemes make of it."""

import argparse
from dataclasses import dataclass

import torch

from nlm.anatomy import MATRICES
from nlm.batch import Batch
from nlm.build import build_engine, parse_config
from nlm.mesh import Mesh
from nlm.model import weights
from nlm.parallel.engine import Engine

LENGTH, VOCAB, ROWS = 8, 17, 8


@dataclass(frozen=True)
class Course:
    """Of each step the loss and the gradient's norm; in the first, of the matrices of each layer [N+M], the encoder's
    first."""

    losses: list[float]
    grad_norms: list[float]
    first: list[float]

    @property
    def finite(self) -> bool:
        return bool(torch.tensor([*self.losses, *self.grad_norms, *self.first]).isfinite().all())

    @property
    def ratio(self) -> float:
        """The first gradient of the encoder's first layer over that of the decoder's last."""
        return self.first[0] / self.first[-1]


def engine_of(scheme: str, n_layers: int, dim: int, lr: float) -> Engine:
    model = {
        "vocab_size": VOCAB,
        "dim": dim,
        "n_heads": 2,
        "ffn_dim": 2 * dim,
        "n_layers": n_layers,
        "architecture": "encoder_decoder",
        "scheme": {"name": scheme},
    }
    table = {
        "model": model,
        "train": {"steps": 1, "batch_tokens": ROWS * LENGTH, "seq_len": LENGTH},
        "optim": {"lr": lr, "schedule": "constant"},
        "data": {"train": "unused"},
        "log": {"dir": "unused"},
    }
    return build_engine(parse_config(table), Mesh())


def copies(seed: int) -> Batch:
    """Random sources, and targets that begin with one token and repeat them."""
    source = torch.randint(1, VOCAB - 1, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Batch(torch.nn.functional.pad(source, (1, 0)), source=source, padding=VOCAB - 1)


def course(scheme: str, n_layers: int, steps: int, dim: int = 16, lr: float = 1e-3) -> Course:
    engine = engine_of(scheme, n_layers, dim, lr)
    found = Course([], [], [])
    for step in range(steps):
        found.losses.append(float(engine.forward_backward(copies(step))))
        norm, norms = engine.clip()
        found.grad_norms.append(float(norm))
        if step == 0:
            squares = torch.zeros(2 * n_layers, dtype=torch.float64)
            for weight, of in zip(engine.pieces.weights.values(), norms, strict=True):
                if weight.site:
                    squares[weight.site.number] += of.square()
            found.first.extend(squares.sqrt().tolist())
        engine.update(lr)
    return found


def update(scheme: str, n_layers: int, dim: int = 16) -> float:
    """How far a small SGD step on the matrices of all blocks moves what the last block leaves, relative to that and to
    the learning rate: what DeepNorm bounds whatever the depth (Wang et al. 2022, arXiv:2203.00555, theorem 4.2)."""
    (model,), rows, lr = engine_of(scheme, n_layers, dim, 1e-3).models, copies(0), 1e-7
    model.double()
    left: list[torch.Tensor] = []
    list(model.blocks.values())[-1].register_forward_hook(lambda _, __, out: left.append(out[0].detach()))
    (model(*rows.arguments()) / rows.n_targets()).backward()
    with torch.no_grad():
        for _, parameter, weight in weights(model):
            if weight.site and weight.role in MATRICES and parameter.grad is not None:
                parameter -= lr * parameter.grad
        model(*rows.arguments())
    before, after = left
    return float((after - before).norm() / before.norm()) / lr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=500, help="of each stack")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--schemes", nargs="+", default=["deepnorm", "post_ln"])
    options = parser.parse_args()
    for scheme in options.schemes:
        depths = [n for n in (8, 16, 32, 64) if n <= options.layers]
        print(f"{scheme}: update by depth {' '.join(f'{n}: {update(scheme, n):.3g}' for n in depths)}", flush=True)
        found = course(scheme, options.layers, options.steps)
        print(
            f"{scheme}, {options.layers}+{options.layers} layers: loss {' '.join(f'{x:.3f}' for x in found.losses)}; "
            f"gradient norm {' '.join(f'{x:.2g}' for x in found.grad_norms)}; first layer's gradient over the last's "
            f"{found.ratio:.2g}; all finite: {found.finite}",
            flush=True,
        )


if __name__ == "__main__":
    main()
