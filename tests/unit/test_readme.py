"""What README.md shows is true: its scheme works, the files it names are there. Its commands: test_docs.py."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nlm import SCHEMES, build_model
from nlm.config import Config
from nlm.signals import Signals

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_scheme_works(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """As written: what all branches together add to the stream is as large after 64 layers as after 4, or smaller."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "(Scheme)" in block]
    namespace: dict[str, object] = {"__name__": "complete_p"}
    exec(code, namespace)
    monkeypatch.setitem(SCHEMES, "complete_p", namespace["CompleteP"])
    rms = {}
    for n_layers in (4, 64):
        model = build_model(make_config({"scheme": {"name": "complete_p"}, "n_layers": n_layers}))
        model.signals = Signals(queries=1)
        model(torch.arange(24).view(2, 12))
        rms[n_layers] = float(model.signals.rms()[-1, 1, 2])
    assert rms[64] < 1.1 * rms[4]


def test_the_files_it_names_are_there() -> None:
    named = set(re.findall(r"\b(?:configs|tools|nlm|tests)/[\w./-]+\w", README))
    assert len(named) > 5
    for path in named - {"nlm/schemes/complete_p.py", "configs/schemes/complete_p.toml"}:
        assert (ROOT / path).exists(), path
