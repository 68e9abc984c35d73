"""Lion's best learning rate is a third to a tenth of AdamW's."""

from math import log

from tools.reproduce.claim import Check, Claim
from tools.reproduce.setting import best

MODEL = {"n_layers": 6}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def best_rates(**optim: object) -> list[float]:
    """Once a seed."""
    by_seed = zip(*best(RATES, "pre_ln", MODEL, train={"steps": 80}, optim=optim), strict=True)
    return [RATES[min(range(len(RATES)), key=lambda i: of[i])] for of in by_seed]


def measure() -> list[Check]:
    adamw, lion = best_rates(), best_rates(name="lion", weight_decay=1.0)
    ratios = [y / x for x, y in zip(lion, adamw, strict=True)]
    note = f"AdamW {', '.join(f'{x:g}' for x in adamw)}; Lion {', '.join(f'{x:g}' for x in lion)}"
    return [
        Check("ln of AdamW's best rate over Lion's", [log(x) for x in ratios], above=log(2), against=0.0, note=note)
    ]


CLAIM = Claim(
    {"optimizers": ("lion",)},
    "Chen et al. 2023, arXiv:2302.06675",
    "Since every weight moves by the whole rate, Lion wants one three to ten times smaller than AdamW",
    measure,
)

if __name__ == "__main__":
    CLAIM.show("lion_rate")
