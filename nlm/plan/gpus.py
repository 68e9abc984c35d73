"""GPUs as their data sheets have them. What is not in the table is asked for, never guessed."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Gpu:
    """Peaks are dense, without the factor 2 of structured sparsity: "fp8" and "bf16" of the tensor cores, "fp32" of the
    ordinary ones, since torch takes float32 products in TF32 only where it is told to, and nothing here does.

    `device_name` is what torch.cuda.get_device_name() calls it. Bandwidths are in bytes/s, NVLink's in one direction,
    half of what data sheets say, which count both.
    """

    device_name: str
    peak_flops: dict[str, float]
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float


# NVIDIA counts memory in GiB and writes GB; of it about 1 GiB is not to be had, for the driver and error correction.
# H100 and H100 NVL: H100 Tensor Core GPU Datasheet (2024). H100 PCIe: H100 Tensor Core GPU Datasheet (2022). H200: H200
# Tensor Core GPU Datasheet (2024). A100: A100 Tensor Core GPU Datasheet (2021; of 40 GB, 2020). B200: HGX B200 in the
# Blackwell datasheet (2025), an eighth of its eight GPUs. All but A100's have bf16 and fp8 with sparsity only: half.
GPUS = {
    "H100": Gpu("NVIDIA H100 80GB HBM3", {"fp8": 1979e12, "bf16": 989.5e12, "fp32": 67e12}, 79, 3.35e12, 450e9),
    "H100-PCIe": Gpu("NVIDIA H100 PCIe", {"fp8": 1513e12, "bf16": 756.5e12, "fp32": 51e12}, 79, 2.0e12, 300e9),
    "H100-NVL": Gpu("NVIDIA H100 NVL", {"fp8": 1670.5e12, "bf16": 835.5e12, "fp32": 60e12}, 93, 3.9e12, 300e9),
    "H200": Gpu("NVIDIA H200", {"fp8": 1979e12, "bf16": 989.5e12, "fp32": 67e12}, 139, 4.8e12, 450e9),
    "H200-NVL": Gpu("NVIDIA H200 NVL", {"fp8": 1670.5e12, "bf16": 835.5e12, "fp32": 60e12}, 139, 4.8e12, 450e9),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", {"bf16": 312e12, "fp32": 19.5e12}, 79, 2.039e12, 300e9),
    "A100-40": Gpu("NVIDIA A100-SXM4-40GB", {"bf16": 312e12, "fp32": 19.5e12}, 39, 1.555e12, 300e9),
    "A100-PCIe": Gpu("NVIDIA A100 80GB PCIe", {"bf16": 312e12, "fp32": 19.5e12}, 79, 1.935e12, 300e9),
    "A100-PCIe-40": Gpu("NVIDIA A100-PCIE-40GB", {"bf16": 312e12, "fp32": 19.5e12}, 39, 1.555e12, 300e9),
    "B200": Gpu("NVIDIA B200", {"fp8": 4500e12, "bf16": 2250e12, "fp32": 75e12}, 178, 8.0e12, 900e9),
}


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind: peak FLOP/s at the config's precision, GiB, bytes/s. What is None does not count.

    Assumed unless given: `efficiency`, the share of peaks and bandwidths that kernels and collectives reach; `host_s`,
    what Python and dispatch take for each kernel; nodes of 8 GPUs, each with a network of 400 Gbit/s, as NVIDIA's DGX
    H100 has. Assumed always: `host_bandwidth`, to the host's memory over 16 lanes of PCIe 4.
    """

    name: str
    peak_flops: float
    memory_gib: float
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    network_bandwidth: float = 50e9
    host_bandwidth: float = 25e9
    gpus_per_node: int = 8
    efficiency: float = 0.7
    host_s: float = 10e-6


def machine(name: str | None, precision: str, gpus: int | None, given: Mapping[str, float]) -> Machine | None:
    """The GPU `name`, or what is `given` of one, which goes before what is known; None where nothing is asked for.

    Errors: ValueError for what is missing, unknown or no positive number.
    """
    bad = [key for key, value in given.items() if not 0 < value < inf]
    if bad or (gpus is not None and gpus < 1):
        raise ValueError(f"{', '.join(bad) or '--gpus'}: expected positive numbers")
    if name is None and gpus is None and not given:
        return None
    known: dict[str, float] = {}
    if of := name and find(name):
        known = {key: getattr(of, key) for key in ("memory_gib", "memory_bandwidth", "link_bandwidth")}
        known |= {"peak_flops": of.peak_flops[precision]} if precision in of.peak_flops else {}
    known |= given

    options = {"peak_flops": "--peak-tflops", "memory_gib": "--memory-gib"}
    if missing := [option for key, option in options.items() if key not in known]:
        of_which = f"of {name!r} in {precision} this is not known" if name else "no --gpu is given"
        raise ValueError(f"{', '.join(missing)}: {of_which}; give it, or --gpu as one of {', '.join(GPUS)}")
    return Machine(name or "this GPU", **known)  # type: ignore[arg-type]


def find(name: str) -> Gpu | None:
    for key, known in GPUS.items():
        if name.lower() in (key.lower(), known.device_name.lower()):
            return known
    return None


def peak_flops(name: str, precision: str) -> float | None:
    """Dense peak of the GPU that torch.cuda.get_device_name() calls so, in FLOP/s; None if it is not known."""
    for known in GPUS.values():
        if name == known.device_name:
            return known.peak_flops.get(precision)
    return None
