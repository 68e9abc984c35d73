"""One rank, for test_faults.py: `nlm train` with a loop of collectives in place of training."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from nlm.cli import main
from nlm.config import Config
from nlm.parallel.launch import process_group
from nlm.parallel.watch import Limits

LIMITS = Limits(join_s=6, answer_s=3, beat_s=1, silent_s=4, grace_s=2.5)
fault = os.environ.get("FAULT", "")
ranks_at_fault = os.environ.get("FAULT_RANKS", "").split()


def train(config: Config) -> None:
    step_together(config)
    step_together(config)  # these processes may join again


def read_for_ever() -> None:
    time.sleep(10**6)


def step_together(config: Config) -> None:
    with process_group(config, torch.device("cpu"), LIMITS if fault != "default limits" else Limits()) as step_ended:
        rank = os.environ.get("RANK", "0")
        if rank in ranks_at_fault and fault == "starts late":
            time.sleep(6)
        for step in range(20 if fault in ("", "starts late") else 10**9):
            if dist.is_initialized():
                dist.all_reduce(torch.ones(1000))
            if step == 10:
                Path(config.log.dir, f"stepping-{rank}").touch()
                if rank in ranks_at_fault and fault == "raise":
                    raise FloatingPointError("step 10: loss nan")
                if rank in ranks_at_fault and fault == "hang":
                    read_for_ever()
            step_ended()
        if rank in ranks_at_fault and not fault:
            time.sleep(6)  # it leaves later than the others


sys.modules["nlm.train"] = SimpleNamespace(train=train)  # type: ignore[assignment]
sys.exit(main(sys.argv[1:]))
