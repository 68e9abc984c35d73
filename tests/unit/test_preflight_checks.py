"""What rank 0 makes of what ranks found: pure functions, of numbers that a test can choose."""

from collections.abc import Callable

import pytest
import torch

from nlm.config import Config
from nlm.preflight.check import Found
from nlm.preflight.clock import CLOCK, SKEW_MS
from nlm.preflight.disk import judge as judge_disk
from nlm.preflight.health import HEALTH, HOT_C, driver_facts
from nlm.preflight.links import judge_axes, judge_next, links
from nlm.preflight.product import checked
from nlm.preflight.product import judge as judge_product

MakeConfig = Callable[..., Config]

GPU = """<?xml version="1.0" ?>
<nvidia_smi_log>
  <driver_version>550.90.07</driver_version>
  <gpu id="0">
    <clocks_{word}_reasons>
      <clocks_{word}_reason_gpu_idle>Active</clocks_{word}_reason_gpu_idle>
      <clocks_{word}_reason_hw_slowdown>{slowed}</clocks_{word}_reason_hw_slowdown>
    </clocks_{word}_reasons>
    <ecc_errors>
      <volatile>
        <sram_correctable>7</sram_correctable>
        <sram_uncorrectable_parity>1</sram_uncorrectable_parity>
        <dram_uncorrectable>2</dram_uncorrectable>
      </volatile>
      <aggregate><dram_uncorrectable>50</dram_uncorrectable></aggregate>
    </ecc_errors>
    <remapped_rows>
      <remapped_row_pending>Yes</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
    </remapped_rows>
    <temperature><gpu_temp>{temperature}</gpu_temp></temperature>
    <processes>
      <process_info><pid>1</pid><type>G</type></process_info>
      <process_info><pid>2</pid><type>C</type></process_info>
      <process_info><pid>3</pid><type>M+C</type></process_info>
    </processes>
  </gpu>
</nvidia_smi_log>"""


@pytest.mark.parametrize("word", ["event", "throttle"])
def test_what_the_driver_says(word: str, make_config: MakeConfig) -> None:
    found = driver_facts(GPU.format(word=word, slowed="Active", temperature="91 C"))
    assert found == {
        "driver": "550.90.07",
        "temperature_c": 91,
        "ecc_errors": 3,
        "memory_row": "replaced at the next reset",
        "clocks": "hw_slowdown",
        "other_processes": 1,
    }
    keys = {problem.key for problem in HEALTH.judge({0: found}, make_config())}
    assert keys == {"ecc_errors", "memory_row", "clocks", "temperature_c", "other_processes"}


def test_what_the_driver_does_not_know_is_not_there(make_config: MakeConfig) -> None:
    xml = "<nvidia_smi_log><gpu><ecc_errors><volatile><dram_uncorrectable>N/A</dram_uncorrectable></volatile>"
    xml += "</ecc_errors><temperature><gpu_temp>N/A</gpu_temp></temperature></gpu></nvidia_smi_log>"
    assert driver_facts(xml) == {"other_processes": 0}
    well = driver_facts(GPU.format(word="event", slowed="Not Active", temperature=f"{HOT_C} C"))
    assert well["clocks"] == "free"
    assert "temperature_c" not in {problem.key for problem in HEALTH.judge({0: well}, make_config())}


def test_another_driver_on_one_host(make_config: MakeConfig) -> None:
    found = {rank: {"host": "a", "driver": "2" if rank == 2 else "1"} for rank in range(4)}
    (problem,) = HEALTH.judge(found, make_config())
    assert problem.ranks == (2,) and "driver 1" in problem.expected and problem.came == "2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_of_this_processor_is_within_rounding(dtype: torch.dtype) -> None:
    error, twice = checked(0, 96, dtype, torch.device("cpu"))
    # In float64 the CPU is compared with itself.
    assert (0 if dtype == torch.float64 else 1e-9) <= error < 1 and twice


def test_slow_and_wrong_products(make_config: MakeConfig) -> None:
    found: dict[int, Found] = {
        rank: {"product_error": 0.1, "product_same": True, "product_flops": 1e12} for rank in range(4)
    }
    assert not list(judge_product(found, make_config()))
    found[1]["product_flops"] = 2e11
    found[2]["product_error"] = 1e300
    found[3]["product_same"] = False
    assert [(p.ranks, p.key) for p in judge_product(found, make_config())] == [
        ((2,), "product_error"), ((3,), "product_error"), ((1,), "product_flops"),
    ]  # fmt: skip


def test_a_gpu_far_below_its_data_sheet(make_config: MakeConfig) -> None:
    config = make_config(train={"precision": "bf16"})
    found: dict[int, Found] = {0: {"gpus": 1, "device": "NVIDIA H100 80GB HBM3", "product_flops": 600e12}}
    assert not list(judge_product(found, config))
    found[0]["product_flops"] = 300e12
    (problem,) = judge_product(found, config)
    assert "35% of the 989.5 TFLOP/s of its data sheet" in problem.expected


@pytest.mark.parametrize("n", range(2, 9))
def test_the_links_of_a_ring_are_taken_without_waiting_in_a_circle(n: int) -> None:
    """As it goes: a link is over once both its ends have come to it."""
    left = {rank: links(rank, n) for rank in range(n)}
    assert sorted(link for mine in left.values() for link in mine) == sorted(2 * list(range(n if n > 2 else 1)))
    while any(left.values()):
        ready = [r for r in range(n) if left[r] and left[r][0] == r and left[(r + 1) % n][:1] == [r]]
        assert ready, left
        for first in ready:
            left[first].pop(0)
            left[(first + 1) % n].pop(0)


def ring(*to_next: float, hosts: str | None = None) -> dict[int, Found]:
    return {rank: {"host": (hosts or "a" * 99)[rank], "to_next": its} for rank, its in enumerate(to_next)}


@pytest.mark.parametrize(
    ("found", "blamed"),
    [
        (ring(9e9, 8e9, 9e9, 8e9), []),
        (ring(9e9, 8e9, 1e9, 8e9), [(2, 3)]),  # one cable
        (ring(9e9, 1e9, 1e9, 8e9), [(2,)]),  # one rank
        (ring(9e9, 0.0, 0.0), [(2,)]),  # to which nothing comes through
        (ring(9e9, 1e9, 9e9, 1e9, hosts="aabb"), []),  # another kind of link
        (ring(9e9, 1e9, 9e9, 1e8, hosts="aabb"), [(3, 0)]),
        (ring(9e9, 9e9), []),
    ],
)
def test_who_is_to_blame_for_slow_links(
    found: dict[int, Found], blamed: list[tuple[int, ...]], make_config: MakeConfig
) -> None:
    assert [problem.ranks for problem in judge_next(found, make_config())] == blamed


def test_a_slow_group(make_config: MakeConfig) -> None:
    found: dict[int, Found] = {
        rank: {"host": "a", "group/tp": [rank - rank % 2, rank - rank % 2 + 1], "all_reduce/tp": 9e9}
        for rank in range(6)
    }
    assert not list(judge_axes(found, make_config()))
    found[3]["all_reduce/tp"] = 1e9
    (problem,) = judge_axes(found, make_config())
    assert problem.ranks == (2, 3) and "along tp" in problem.expected


def test_nvlink_is_expected_where_cards_have_it(make_config: MakeConfig) -> None:
    def found(device: str) -> dict[int, Found]:
        its = {"host": "a", "gpus": 2, "device": device, "group/tp": [0, 1], "all_reduce/tp": 20e9}
        return {0: its, 1: its}

    (problem,) = judge_axes(found("NVIDIA H100 80GB HBM3"), make_config())
    assert "35% of the 450 GB/s" in problem.expected
    assert not list(judge_axes(found("NVIDIA H100 PCIe"), make_config())), "it may have no bridge"
    assert not list(judge_axes(found("a card that nobody knows"), make_config()))


def test_clocks(make_config: MakeConfig) -> None:
    """What the store takes for the way is not held against a clock."""
    found = {
        rank: {"skew_ms": skew, "skew_unsure_ms": unsure}
        for rank, (skew, unsure) in enumerate([(0, 0), (SKEW_MS, 1), (-SKEW_MS - 2, 1), (SKEW_MS + 2, 3)])
    }
    assert [problem.ranks for problem in CLOCK.judge(found, make_config())] == [(2,)]


def test_room_and_speed(make_config: MakeConfig) -> None:
    found: dict[int, Found] = {
        0: {"needed_bytes": 100, "free_bytes": 100, "write_speed": 9e7},
        1: {"free_bytes": 100, "write_speed": 8e7},
        2: {"free_bytes": 100, "write_speed": 7e6},
    }
    (problem,) = judge_disk(found, make_config())
    assert problem.ranks == (2,) and problem.key == "write_speed"
    found[0]["needed_bytes"] = 101
    assert [problem.key for problem in judge_disk(found, make_config())] == ["free_bytes", "write_speed"]
