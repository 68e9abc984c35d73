"""LayerNorm knows neither shift nor scale of its input, RMSNorm the shift."""

import torch

from nlm.anatomy import Span
from nlm.norms import LayerNorm, NormSite, RMSNorm
from nlm.parallel.tensor import TensorParallel
from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import SEEDS

AT = NormSite(Span.whole(64), TensorParallel(), eps=1e-12)


def change(norm: type[LayerNorm] | type[RMSNorm], scale: float, shift: float) -> list[float]:
    """Once a seed: the largest change of an output when inputs are scaled and shifted."""
    layer = norm(AT).double()
    torch.nn.init.ones_(layer.weight)
    inputs = [torch.randn(8, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in SEEDS]
    return [float((layer(scale * x + shift) - layer(x)).abs().max()) for x in inputs]


def measure() -> list[Check]:
    return [
        Check("change of LayerNorm by 3 x + 5", change(LayerNorm, 3.0, 5.0), below=1e-8),
        Check("of RMSNorm by 3 x", change(RMSNorm, 3.0, 0.0), below=1e-8),
        Check("of RMSNorm by x + 5", change(RMSNorm, 1.0, 5.0), above=0.1),
    ]


CLAIM = Claim(
    {"norms": ("layernorm", "rmsnorm")},
    "Ba et al. 2016, arXiv:1607.06450; Zhang & Sennrich 2019, arXiv:1910.07467",
    "LayerNorm is invariant to re-centring and re-scaling of what it reads, RMSNorm to re-scaling only",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("layernorm_invariance")
