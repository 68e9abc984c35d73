"""Tuned, Adam is as good as LAMB with large batches."""

from typing import Any

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import as_good, best, lowest

MODEL = {"n_layers": 4}
LARGE: dict[str, Any] = {"batch_tokens": 2048, "steps": 40}


def tuned(name: str, rates: tuple[float, ...]) -> list[float]:
    found = best(rates, "pre_ln", MODEL, train=LARGE, optim={"name": name})
    return found[lowest(found)]


def measure() -> list[Check]:
    adam, lamb = tuned("adamw", (3e-3, 1e-2, 3e-2)), tuned("lamb", (1e-2, 3e-2, 1e-1))
    return [as_good("Adam", adam, "LAMB", lamb)]


CLAIM = Claim(
    {"optimizers": ("lamb",)},
    "Nado et al. 2021, arXiv:2102.06356",
    "With as much tuning, Adam matches LAMB at large batches (here 8 times the usual)",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("lamb_batch")
