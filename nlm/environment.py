"""What a run ran on and with: `environment.json` in its folder. Only what is known; nothing is guessed."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from nlm.build import design
from nlm.config import Config
from nlm.mesh import AXES
from nlm.model import Part
from nlm.optim import OPTIMIZERS
from nlm.plan.fake import faked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp64": torch.float64}
SEVERAL_OPERATIONS = "single torch operations"


def write_environment(run: Path, config: Config, device: torch.device) -> None:
    text = json.dumps(environment(config, device), indent=1)
    (run / "environment.json").write_text(text + "\n", encoding="utf-8")


def environment(config: Config, device: torch.device) -> dict[str, Any]:
    parallel = config.parallel
    fused = OPTIMIZERS[config.optim.name].fused
    return {
        "nlm": version("nlm"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "ranks": parallel.ranks,
        "layout": {axis: size for axis in AXES if (size := getattr(parallel, axis)) > 1},
        "engine": parallel.engine,
        "precision": config.train.precision,
        "compile": parallel.compile,
        "recompute": parallel.recompute,
        "kernels": parallel.kernels if parallel.compile else "torch",
        "attention": attention_kernel(config, device),
        "optimizer": "one fused kernel" if fused else SEVERAL_OPERATIONS,
    }


def device_name(device: torch.device) -> str:
    """The GPU as its driver calls it, or the processor as Linux does, "cpu" elsewhere."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "cpu")


def attention_kernel(config: Config, device: torch.device) -> str:
    """What torch chooses for the scaled dot products of this config on this device, by its name for it.

    The call is that of the model's own first layers, which are traced without memory; torch is asked about tensors of
    one sample of that shape.
    """
    first = Part(range(min(config.model.n_layers, 4)), first=True, last=False)  # not every layer may have attention
    traced = design(config, part=first)
    with FakeTensorMode(), _Calls() as calls:
        faked(traced)
        tokens = torch.zeros(1, config.train.seq_len, dtype=torch.int64)
        source = torch.zeros(1, config.source_len, dtype=torch.int64) if config.model.reads_source else None
        traced(tokens, source, segments=tokens if config.data.document_mask else None)
    if not calls.seen:
        return SEVERAL_OPERATIONS
    (query, key, value), options = calls.seen[0]
    dtype = DTYPES[config.train.precision]
    q, k, v = (torch.empty(x.shape, dtype=dtype, device=device, requires_grad=True) for x in (query, key, value))
    if (mask := options["attn_mask"]) is not None:
        options["attn_mask"] = torch.ones(mask.shape, dtype=torch.bool, device=device)
    chosen = torch._fused_sdp_choice(q, k, v, **options)
    return SDPBackend(chosen).name.lower().replace("_", " ")


class _Calls(TorchFunctionMode):
    """Keeps what F.scaled_dot_product_attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append((args[:3], dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _commit() -> str | None:
    """Of the checkout that nlm runs from, with a "+" where it was changed since; None where it is installed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", os.fspath(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
