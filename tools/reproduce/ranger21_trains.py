"""Ranger21 trains without norms where AdamW is stuck."""

from typing import Any

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import best, lowest, trains

PLAIN = {"n_layers": 12, "scheme": {"name": "skipinit", "alpha": 1.0}}
RANGER21: dict[str, Any] = {
    "name": "ranger21",
    "weight_decay": 1e-4,
    "clip": 0.0,
    "agc": 0.01,
    "centralize": True,
    "schedule": "wsd",
    "warmup_steps": 22,
    "decay_frac": 0.28,
    "final_lr_frac": 0.03,
}


RATES = (3e-4, 1e-3)


def tuned(**optim: Any) -> list[float]:
    found = best(RATES, "skipinit", PLAIN, optim=optim)
    return found[lowest(found)]


def measure() -> list[Check]:
    return [trains("Ranger21", tuned(**RANGER21)), trains("AdamW", tuned(), fails=True)]


CLAIM = Claim(
    {"optimizers": ("ranger21",)},
    "Wright & Demeure 2021, arXiv:2106.13731",
    "Ranger21 trains a network without norms with which AdamW gets nowhere",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("ranger21_trains")
