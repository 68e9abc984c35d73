"""From config to objects: the one place where schemes, norms and scores are looked up by name."""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, create_model

from nlm.attention import SCORES
from nlm.config import AttentionChoice, Config, ConfigError, Table, describe, nearest, read_table
from nlm.init import init
from nlm.model import Transformer
from nlm.norms import NORMS
from nlm.schemes import SCHEMES


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a TOML file, `extends` followed and `overrides` ("a.b=value") applied.

    Errors: ConfigError (a ValueError) with every problem at once, those of the chosen scheme's fields included.
    """
    return parse_config(read_table(path, overrides))


def parse_config(table: Table) -> Config:
    """As `load_config`, of a table already read."""
    problems: list[str] = []
    config: Config | None = None
    try:
        config = Config.parse(table)
    except ConfigError as error:
        problems += error.problems
    model = table.get("model")
    problems += _bad_choices(model) if isinstance(model, dict) else []
    if problems or config is None:
        raise ConfigError(problems)
    return config


def build_model(config: Config, seed: int | None = None, device: str | torch.device = "cpu") -> Transformer:
    """The model of a config in float32, materialized and initialized; `seed` defaults to train.seed."""
    model = config.model
    scheme = SCHEMES[model.scheme.name](**model.scheme.fields)
    score = partial(SCORES[model.attention.score], **model.attention.fields)
    norm = partial(NORMS[model.norm], eps=model.norm_eps, bias=model.bias)
    with torch.device("meta"):
        transformer = Transformer(model, config.train.seq_len, scheme, norm, score)
    return init(transformer.to_empty(device=device), config.train.seed if seed is None else seed)


def _bad_choices(model: Mapping[str, Any]) -> Iterable[str]:
    norm = model.get("norm")
    if isinstance(norm, str) and norm not in NORMS:
        yield f"model.norm: no norm is called {norm!r}; {nearest(norm, NORMS)}"
    yield from _bad_choice("model.scheme", "name", model.get("scheme"), SCHEMES)
    attention = model.get("attention", {})
    if isinstance(attention, dict):
        yield from _bad_choice("model.attention", "score", {"score": AttentionChoice().score} | attention, SCORES)


def _bad_choice(key: str, selector: str, table: Any, choices: Mapping[str, type]) -> Iterable[str]:
    if not isinstance(table, Mapping) or not isinstance(name := table.get(selector), str):
        return  # missing or of the wrong type: reported with the config's own problems
    if name not in choices:
        yield f"{key}.{selector}: no {key.rpartition('.')[2]} {selector} is {name!r}; {nearest(name, choices)}"
        return
    parameters = inspect.signature(choices[name]).parameters.values()
    fields: dict[str, Any] = {
        p.name: (p.annotation, p.default) for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    Fields = create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
    try:
        Fields.model_validate({k: v for k, v in table.items() if k != selector})
    except ValidationError as error:
        yield from describe(error.errors(), prefix=f"{key}.")
