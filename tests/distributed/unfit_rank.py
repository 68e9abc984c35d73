"""One rank, for test_preflight.py: `nlm preflight`, on what cannot be had for real: a processor that computes wrongly
or never ends, another torch."""

import os
import sys
import time
from functools import partial

import torch
from torch import Tensor

import nlm.preflight
from nlm.cli import main
from nlm.preflight import product, run

fault = os.environ.get("FAULT", "")
right = product.multiply


def wrong(a: Tensor, b: Tensor) -> Tensor:
    """One bit of one number."""
    result = right(a, b)
    result[-1, -1] *= 1 + 2**-9
    return result


def moody(a: Tensor, b: Tensor) -> Tensor:
    """Within rounding, but not twice the same."""
    result = right(a, b)
    result.view(-1)[time.perf_counter_ns() % 1000] *= 1 + 2**-22
    return result


def endless(a: Tensor, b: Tensor) -> Tensor:
    while True:
        time.sleep(1)


product.multiply = {"wrong": wrong, "moody": moody, "endless": endless}.get(fault, right)
if fault == "another torch":
    torch.__version__ = "2.0.1"  # type: ignore[assignment]
if limit := os.environ.get("CHECK_S"):
    nlm.preflight.preflight = partial(run.preflight, check_s=float(limit))
sys.exit(main(["preflight", *sys.argv[2:]]))
