"""After LSUV every matrix gives unit variance on real text."""

import torch

from nlm.model import Linear
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS, build, rows


@torch.no_grad()
def deviations(seed: int) -> list[float]:
    """Of each matrix of the blocks: |std / target - 1| of what it gives, the target being 1, or 1/sqrt(2L) for what is
    written into the stream."""
    model = build("pre_ln", seed, init="lsuv")
    stds: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith("blocks"):
            module.register_forward_hook(lambda _, __, out, name=name: stds.update({name: float(out.std())}))
    model(rows(seed)[:, :-1])
    written = (2 * model.n_layers) ** -0.5
    return [abs(std / (written if name.endswith(("wo", "w_down")) else 1.0) - 1) for name, std in stds.items()]


def measure() -> list[Check]:
    return [Check("mean |std / target - 1|", [sum(d) / len(d) for d in map(deviations, SEEDS)], below=0.1)]


CLAIM = Claim(
    {"inits": ("lsuv",)},
    "Mishkin & Matas 2016, arXiv:1511.06422",
    "One pass of scaling gives the outputs of every layer unit variance, within a tenth",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("lsuv_variance")
