"""From config to objects: the one place where schemes, norms and scores are looked up by name."""

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, create_model

from nlm.attention import SCORES
from nlm.config import AttentionChoice, Config, ConfigError, OptimConfig, Table, describe, nearest, read_table
from nlm.init import init
from nlm.layout import layout_problems
from nlm.mesh import Mesh
from nlm.model import Part, Transformer, held
from nlm.norms import NORMS
from nlm.optim import OPTIMIZERS
from nlm.parallel.compile import compile_model
from nlm.parallel.engine import Engine, WholeEngine
from nlm.parallel.pipeline import PipelineEngine, split, stages_of
from nlm.parallel.recompute import recompute_blocks
from nlm.parallel.shard import shard
from nlm.parallel.tensor import TensorParallel
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
        problems += layout_problems(config)
    except ConfigError as error:
        problems += error.problems
    model = table.get("model")
    problems += _bad_choices(model) if isinstance(model, dict) else []
    problems += _bad_optimizer(table.get("optim"))
    if problems or config is None:
        raise ConfigError(problems)
    return config


def build_model(config: Config, seed: int | None = None, device: str | torch.device = "cpu") -> Transformer:
    """The whole model of a config in float32, materialized and initialized; `seed` defaults to train.seed."""
    return init(design(config).to_empty(device=device), config.train.seed if seed is None else seed)


def design(config: Config, tp: TensorParallel | None = None, part: Part | None = None) -> Transformer:
    """The model or a part of its stack, of it what a tensor parallel rank holds, without memory of its own yet."""
    model = config.model
    scheme = SCHEMES[model.scheme.name](**model.scheme.fields)
    score = partial(SCORES[model.attention.score], **model.attention.fields)
    norm = partial(NORMS[model.norm], eps=model.norm_eps, bias=model.bias)
    with torch.device("meta"):
        return Transformer(model, config.train.seq_len, scheme, norm, score, tp, part)


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """What trains the model in the layout of the config, with this rank's parts of it, initialized."""
    parallel = config.parallel
    whole = design(config, mesh.tp)
    weights = {h.name: h.weight for h in held(whole)}
    if parallel.pp > 1:
        parts = split(config.model, config.train.seq_len, parallel.n_stages)
        stages = stages_of(mesh.rank("pp"), parallel)
        models = [prepare(design(config, mesh.tp, parts[stage]), config, mesh) for stage in stages]
        return PipelineEngine(config, mesh, models, weights, stages)
    model = prepare(whole, config, mesh)
    if parallel.engine == "deepspeed":
        from nlm.parallel.deepspeed import DeepSpeedEngine  # an optional extra, imported only when chosen

        return DeepSpeedEngine(config, mesh, model, weights)
    return WholeEngine(config, mesh, model, weights)


def prepare(model: Transformer, config: Config, mesh: Mesh) -> Transformer:
    """Sharded, materialized, initialized, recomputed and compiled as the config has it."""
    if config.train.precision == "fp64":
        model.double()
    shard(model, config.parallel, mesh)
    init(model.to_empty(device=mesh.device), config.train.seed)
    if config.parallel.recompute == "block":
        recompute_blocks(model)
    if config.parallel.compile:
        compile_model(model)
    return model


def _bad_choices(model: Mapping[str, Any]) -> Iterable[str]:
    norm = model.get("norm")
    if isinstance(norm, str) and norm not in NORMS:
        yield f"model.norm: no norm is called {norm!r}; {nearest(norm, NORMS)}"
    yield from _bad_choice("model.scheme", "name", model.get("scheme"), SCHEMES)
    attention = model.get("attention", {})
    if isinstance(attention, dict):
        yield from _bad_choice("model.attention", "score", {"score": AttentionChoice().score} | attention, SCORES)


def _bad_optimizer(optim: Any) -> Iterable[str]:
    if isinstance(optim, Mapping):
        own = {k: v for k, v in optim.items() if k == "name" or k not in OptimConfig.model_fields}
        yield from _bad_choice("optim", "name", {"name": OptimConfig.model_fields["name"].default} | own, OPTIMIZERS)


def _bad_choice(key: str, selector: str, table: Any, choices: Mapping[str, type]) -> Iterable[str]:
    if not isinstance(table, Mapping) or not isinstance(name := table.get(selector), str):
        return  # missing or of the wrong type: reported with the config's own problems
    if name not in choices:
        yield f"{key}.{selector}: no {key.rpartition('.')[2]} {selector} is {name!r}; {nearest(name, choices)}"
        return
    parameters = inspect.signature(choices[name]).parameters.values()
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    Fields = create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
    try:
        Fields.model_validate({k: v for k, v in table.items() if k != selector})
    except ValidationError as error:
        yield from describe(error.errors(), prefix=f"{key}.")
