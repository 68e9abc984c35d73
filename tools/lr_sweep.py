"""Validation loss of every scheme over learning rates: `python tools/lr_sweep.py CONFIG [key=value …]`.

Schemes can only be compared each at its own best rate. Every run keeps its folder below log.dir, so that the
sweep goes on where it was stopped; a run that diverges counts as inf.
"""

import argparse
import json
from math import inf
from pathlib import Path

from nlm import SCHEMES, load_config
from nlm.train import train

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)


def validation_loss(config: str, overrides: list[str], scheme: str, rate: float) -> float:
    root = Path(load_config(config, overrides).log.dir)
    own = [f"model.scheme.name={scheme}", f"optim.lr={rate}", f"log.dir={root / f'{scheme}-{rate:g}'}"]
    try:
        run = train(load_config(config, [*overrides, *own]))
    except FloatingPointError:
        return inf
    *_, last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(last)["validation_loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="with data.validation set")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    options = parser.parse_args()
    print("scheme     " + "".join(f"{rate:>9g}" for rate in RATES))
    for scheme in options.schemes:
        losses = [validation_loss(options.config, options.overrides, scheme, rate) for rate in RATES]
        print(f"{scheme:11}" + "".join(f"{loss:9.3f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
