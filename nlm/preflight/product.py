"""Whether a rank multiplies right, the same twice, and as fast as the others.

A sick GPU returns wrong numbers and no error ("silent data corruption": Dixit et al. 2021, arXiv:2102.11245).
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from nlm.config import Config
from nlm.environment import DTYPES
from nlm.plan.gpus import Machine, peak_flops
from nlm.preflight.check import All, Check, Column, Found, Place, Problem, far_below, having

SEEDS = 3
N = {"cpu": 256, "cuda": 1024}
"""Size of the products that are checked: the CPU's float64 takes 0.1 s for one of 1024."""
TIMED_N = {"cpu": 384, "cuda": 8192}
"""Of those that are timed: on a GPU a millisecond each, with all of it at work; on a CPU little beside a test."""
TIMES = 20
SLOW_SHARE = {"cpu": 0.25, "cuda": 0.8}
"""Of the median. GPUs of a kind are within some percent of each other; ranks on CPUs share cores with whatever runs."""
PEAK_SHARE = 0.5 * Machine.efficiency
"""Of the data sheet's: half of what the planner takes products to reach, which no healthy GPU is below."""


def measure(place: Place, found: Found) -> None:
    device = place.device
    precision = DTYPES[place.config.train.precision]
    worst, same = 0.0, True
    for seed in range(SEEDS):
        for dtype in {torch.float32, precision}:
            error, twice = checked(seed, N[device.type], dtype, device)
            worst, same = max(worst, error), same and twice
            found |= {"product_error": worst, "product_same": same}
    found["product_flops"] = speed(TIMED_N[device.type], precision, device)


def checked(seed: int, n: int, dtype: torch.dtype, device: torch.device) -> tuple[float, bool]:
    """-> the largest error of an element of [n n] @ [n n], of what rounding alone can make it; whether the product is
    bit-equal when computed once more.

    Rounding: n u |A| |B| and less for sums in any order (Higham 2002, Accuracy and Stability, section 3.5), where u is
    float32's, in which bfloat16 products are summed up too, or float64's; and that of the result. eps is 2 u, since
    tensor cores cut off instead of rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    on_device = a.to(device), b.to(device)
    product = multiply(*on_device)
    twice = bool(torch.equal(product, multiply(*on_device)))
    summed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    exact, bound = a.double() @ b.double(), n * summed * (a.double().abs() @ b.double().abs())
    bound += torch.finfo(dtype).eps * exact.abs()
    error = ((product.cpu().double() - exact).abs() / bound).nan_to_num(float("inf")).max()
    return min(float(error), 1e300), twice  # JSON has no infinity


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def speed(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of TIMES products: of what the device can do, other work on it takes least from that."""
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(TIMES):
        synchronize(device)
        began = time.perf_counter()
        multiply(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge(found: All, config: Config) -> Iterator[Problem]:
    sick = "this processor computes wrongly: test it (GPU: dcgmi diag -r 3), leave its host out"
    for rank, error in having(found, "product_error").items():
        if not error <= 1:
            came = f"{error:.3g} times as much"
            yield Problem((rank,), "product_error", "a product as exact as rounding lets it be", came, sick)
        if not found[rank]["product_same"]:
            yield Problem((rank,), "product_error", "the same product twice", "two that differ", sick)
    speeds = having(found, "product_flops")
    if not speeds:
        return
    kind = "cuda" if any("gpus" in its for its in found.values()) else "cpu"
    usual, slow = far_below(speeds, SLOW_SHARE[kind])
    dtype = {"fp8": "bf16"}.get(config.train.precision, config.train.precision)
    todo = "see what else runs on that host, and whether something lowers its clocks"
    for rank, flops in speeds.items():
        came = f"{flops / 1e12:.3g} TFLOP/s"
        peak = peak_flops(found[rank].get("device", ""), dtype) if kind == "cuda" else None
        if rank in slow:
            expected = f"at least {SLOW_SHARE[kind]:.0%} of the ranks' median, {usual / 1e12:.3g} TFLOP/s"
            yield Problem((rank,), "product_flops", expected, came, todo)
        elif peak and flops < PEAK_SHARE * peak:
            expected = f"at least {PEAK_SHARE:.0%} of the {peak / 1e12:g} TFLOP/s of its data sheet"
            yield Problem((rank,), "product_flops", expected, came, todo)


PRODUCT = Check(
    "product",
    measure,
    judge,
    (
        Column("product_error", "product, of rounding", "{:.2g}", worst=max),
        Column("product_flops", "TFLOP/s", "{:.3g}", 1e-12),
    ),
    "see what else runs on that host",
)
