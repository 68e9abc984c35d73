"""Every rank's GPU as its driver sees it, and the libraries below torch, which must be the same for all."""

import shutil
import subprocess
from collections.abc import Iterator
from xml.etree import ElementTree

import torch

from nlm.config import Config
from nlm.environment import device_name
from nlm.preflight.check import All, Check, Column, Found, Place, Problem, having, unlike_most

HOT_C = 80
"""Before the first step: data sheets have the clocks lowered from 85 to 90 °C, and an idle GPU is at 30 to 50."""
FREE_SHARE = 0.9
"""Of the memory: CUDA's context takes half a GiB, and so much is anybody's who computes there too."""
SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
"""Reasons for lower clocks that a fault has. Idling and the power limit are none."""
ANSWER_S = 30
"""nvidia-smi takes a second; where the driver hangs, for ever."""
SAME = {"device": "device", "gpus": "GPUs on the host", "driver": "driver", "cuda": "CUDA", "nccl": "NCCL"}


def measure(place: Place, found: Found) -> None:
    found |= {"host": place.host, "local_rank": place.local_rank, "device": device_name(place.device)}
    if place.device.type != "cuda":
        return
    found |= {"gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    torch.ones(1, device=place.device)  # a context of this process, which nvidia-smi counts
    free, total = torch.cuda.mem_get_info(place.device)
    found |= {"free_memory": free, "free_memory_share": free / total}
    if shutil.which("nvidia-smi"):
        uuid = f"GPU-{torch.cuda.get_device_properties(place.device).uuid}"
        command = ["nvidia-smi", "-q", "-x", "-i", uuid]
        said = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
        if said.returncode == 0:  # a part of a GPU (MIG) has another name, and no health of its own
            found |= driver_facts(said.stdout)


def driver_facts(xml: str) -> Found:
    """What of one GPU `nvidia-smi -q -x` says; what it does not know ("N/A"), or has no name for, is not there.

    Drivers before 535 say "throttle" where later ones say "event"; the kinds of uncorrectable errors differ too.
    """
    log = ElementTree.fromstring(xml)
    gpu = log.find("gpu")
    if gpu is None:
        return {}
    found: Found = {}
    if driver := log.findtext("driver_version"):
        found["driver"] = driver
    degrees, _, unit = gpu.findtext("temperature/gpu_temp", "").partition(" ")
    if unit == "C":
        found["temperature_c"] = int(degrees)
    errors = [
        int(count.text)
        for count in gpu.iterfind("ecc_errors/volatile//*")
        if count.text and count.text.isdecimal() and "uncorrectable" in count.tag
    ]
    if errors:
        found["ecc_errors"] = sum(errors)
    repairs = [gpu.findtext(f"remapped_rows/remapped_row_{what}") for what in ("pending", "failure")]
    if "Yes" in repairs:
        found["memory_row"] = "replaced at the next reset" if repairs[1] != "Yes" else "cannot be replaced"
    reasons = [gpu.find(f"clocks_{word}_reasons") for word in ("event", "throttle")]
    if known := [reason for reason in reasons if reason is not None]:
        active = [reason.tag for reason in known[0] if reason.text == "Active"]
        slowed = [name for name in SLOWED if any(tag.endswith(f"reason_{name}") for tag in active)]
        found["clocks"] = ", ".join(slowed) or "free"
    # One of them is this rank. Its number here may be another: that of the host, seen from inside a container.
    computing = [p for p in gpu.iterfind("processes/process_info") if "C" in p.findtext("type", "")]
    found["other_processes"] = max(0, len(computing) - 1)
    return found


def judge(found: All, config: Config) -> Iterator[Problem]:
    for key, what in SAME.items():
        if values := having(found, key):
            usual, others = unlike_most(values)
            for rank in others:
                todo = "give all hosts the same, or leave this one out"
                yield Problem((rank,), key, f"{what} {usual}, as most ranks have", f"{values[rank]}", todo)
    for rank, its in found.items():
        if its.get("ecc_errors"):
            todo = "reset the GPU (nvidia-smi -r) and test it (dcgmi diag -r 3), or leave this host out"
            yield Problem((rank,), "ecc_errors", "no uncorrectable memory errors", str(its["ecc_errors"]), todo)
        if "memory_row" in its:
            todo = "reset the GPU (nvidia-smi -r); where that does not help, have it replaced"
            yield Problem((rank,), "memory_row", "sound memory", f"a row that is {its['memory_row']}", todo)
        if its.get("clocks", "free") != "free":
            todo = "see to its cooling and its power supply, or leave this host out"
            yield Problem((rank,), "clocks", "clocks that nothing lowers", its["clocks"], todo)
        if its.get("temperature_c", 0) > HOT_C:
            came = f"{its['temperature_c']} °C before the first step"
            yield Problem((rank,), "temperature_c", f"at most {HOT_C} °C", came, "see to its cooling")
        if its.get("other_processes"):
            came = f"{its['other_processes']} more"
            todo = "see nvidia-smi on that host, and end what is left of another run"
            yield Problem((rank,), "other_processes", "no other process on the GPU", came, todo)
        elif its.get("free_memory_share", 1) < FREE_SHARE:
            came = f"{its['free_memory_share']:.0%}"
            todo = "see nvidia-smi on that host: something holds the rest"
            yield Problem((rank,), "free_memory", f"{FREE_SHARE:.0%} of its memory to be free", came, todo)


HEALTH = Check(
    "health",
    measure,
    judge,
    (
        Column("temperature_c", "°C", "{:.0f}", worst=max),
        Column("ecc_errors", "ECC errors", "{:.0f}", worst=max),
        Column("other_processes", "other processes", "{:.0f}", worst=max),
        Column("free_memory", "free, GiB", "{:.1f}", 2**-30),
    ),
    "see whether nvidia-smi answers on that host",
)
