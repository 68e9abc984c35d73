"""ReZero converges faster than Post-LN, and needs no warmup."""

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import best, less, lowest

RATES = (1e-3, 3e-3)


def measure() -> list[Check]:
    rezero, post_ln = best(RATES, "rezero"), best(RATES, "post_ln", optim={"warmup_steps": 30})
    i, j = lowest(rezero), lowest(post_ln)
    return [less("loss", f"ReZero at lr {RATES[i]:g}", rezero[i], f"Post-LN with warmup at {RATES[j]:g}", post_ln[j])]


CLAIM = Claim(
    {"schemes": ("rezero",)},
    "Bachlechner et al. 2020, arXiv:2003.04887",
    "A ReZero Transformer of 12 layers, without norms and warmup, converges faster than one with Post-LN and warmup",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("rezero_faster")
