"""What a run says of the machine and the kernels it ran on."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nlm import SCHEMES, SCORES, build_model
from nlm.config import Config
from nlm.environment import SEVERAL_OPERATIONS, attention_kernel
from nlm.train import train

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """The names of all operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "model",
    [
        *({"attention": {"score": score}} for score in SCORES),
        {"n_heads": 4, "n_kv_heads": 2},
        {"architecture": "encoder"},
    ],
    ids=str,
)
def test_the_attention_kernel_is_the_one_that_runs(model: dict[str, Any], make_config: Callable[..., Config]) -> None:
    config = make_config(model)
    with Operations() as ran:
        build_model(config)(torch.arange(12).view(1, 12)).sum().backward()
    flash = "_scaled_dot_product_flash_attention_for_cpu" in ran.names
    assert attention_kernel(config, CPU) == ("flash attention" if flash else SEVERAL_OPERATIONS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_traced(scheme: str, make_config: Callable[..., Config]) -> None:
    assert attention_kernel(make_config({"scheme": {"name": scheme}}), CPU) == "flash attention"


def test_it_is_in_the_run(run_config: Callable[..., Config]) -> None:
    run = train(run_config("run", train={"steps": 1}, optim={"name": "lion"}))
    written = json.loads((run / "environment.json").read_text())
    assert written["torch"] == torch.__version__ and written["device"] != ""
    assert (written["ranks"], written["layout"], written["engine"]) == (1, {}, "torch")
    assert (written["precision"], written["optimizer"]) == ("fp32", SEVERAL_OPERATIONS)
