"""Fixup's first update does not grow with depth."""

from nlm.batch import Batch
from nlm.probe.measure import measure as probed
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import build, exponents, rows

DEPTHS = [8, 16, 32, 64]


def update(seed: int, n_layers: int, attends: bool = True) -> float:
    """How far one step of SGD moves the stream; with a head that is not 0 any more, without which nothing moves."""
    model = build("fixup", seed, n_layers=n_layers).double()
    head = model.get_parameter("head.weight")
    head.data.copy_(build("pre_ln", seed, n_layers=1).get_parameter("head.weight"))
    for block in model.blocks.values() if not attends else []:
        block.attn.wv.weight.data.zero_()
    return float(probed(model, Batch(rows(seed, batch_tokens=64))).update["sgd"][-1])


def ffns(seed: int, n_layers: int) -> float:
    return update(seed, n_layers, attends=False)


def measure() -> list[Check]:
    return [
        Check("power of depth of the update by FFNs", exponents(DEPTHS, ffns), below=0.15, against=0.5),
        Check("by all sublayers", exponents(DEPTHS, update), below=0.15, against=0.5),
    ]


CLAIM = Claim(
    {"schemes": ("fixup",)},
    "Zhang et al. 2019, arXiv:1901.09321",
    "One step of SGD at rate η changes the network by Θ(η), whatever its depth",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("fixup_update")
