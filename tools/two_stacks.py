"""An encoder and a decoder of so many layers each before the first step, at the width of configs/runs/deepnet-500.toml:
`python tools/two_stacks.py --layers 6 12 24 48 96 --schemes deepnorm post_ln`."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from nlm.anatomy import MATRICES
from nlm.batch import Batch
from nlm.build import build_model, parse_config
from nlm.config import read_table
from nlm.model import Transformer, weights

CONFIG = Path(__file__).parents[1] / "configs/runs/deepnet-500.toml"
ROWS = 16


def start(scheme: str, n_layers: int) -> tuple[Transformer, Batch]:
    """The model, in float64, and random sources with their copies."""
    config = parse_config(read_table(CONFIG, [f"model.scheme.name={scheme}", f"model.n_layers={n_layers}"]))
    length = config.source_len
    source = torch.randint(config.model.padding, (ROWS, length), generator=torch.Generator().manual_seed(0))
    copies = torch.nn.functional.pad(source, (1, 0))[:, : config.train.seq_len + 1]
    return build_model(config).double(), Batch(copies, source=source, padding=config.model.padding)


def update(scheme: str, n_layers: int) -> float:
    """How far a small SGD step on the matrices of all blocks moves what the last block leaves, relative to that and to
    the learning rate: what DeepNorm bounds whatever the depth (Wang et al. 2022, arXiv:2203.00555, theorem 4.2)."""
    (model, rows), lr = start(scheme, n_layers), 1e-7
    left: list[Tensor] = []
    list(model.blocks.values())[-1].register_forward_hook(lambda _, __, out: left.append(out[0].detach()))
    (model(*rows.arguments()) / rows.n_targets()).backward()
    with torch.no_grad():
        for _, parameter, weight in weights(model):
            if weight.site and weight.role in MATRICES and parameter.grad is not None:
                parameter -= lr * parameter.grad
        model(*rows.arguments())
    before, after = left
    return float((after - before).norm() / before.norm()) / lr


@torch.no_grad()
def heard(scheme: str, n_layers: int) -> tuple[float, float]:
    """How much of the memory, and of the logits, differs between sources: the RMS of what is not their mean over the
    RMS of all. The target is the same throughout."""
    model, rows = start(scheme, n_layers)
    assert model.encoder is not None and model.encoder.final is not None
    memories: list[Tensor] = []
    model.encoder.final.register_forward_hook(lambda _, __, out: memories.append(out))
    logits = model(rows.inputs[:1].expand_as(rows.inputs), rows.source)
    memory, logits = (float((x - x.mean(0)).norm() / x.norm()) for x in (memories[0], logits))
    return memory, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24, 48, 96], help="of each stack")
    parser.add_argument("--schemes", nargs="+", default=["deepnorm", "post_ln"])
    options = parser.parse_args()
    for scheme in options.schemes:
        for n in options.layers:
            memory, logits = heard(scheme, n)
            print(
                f"{scheme}, {n}+{n} layers: update {update(scheme, n):.3g}; "
                f"of the memory {memory:.2g} differs between sources, of the logits {logits:.2g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
