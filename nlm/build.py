"""From config to objects: the one place where schemes, norms and scores are looked up by name."""

import inspect
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor

from nlm.anatomy import Kind, Role, Site, Weight
from nlm.calibrate import calibrated
from nlm.config import (
    AttentionChoice,
    Config,
    ConfigError,
    ModelConfig,
    OptimConfig,
    Table,
    WeightNormChoice,
    describe,
    nearest,
    read_table,
)
from nlm.float8 import multiply_in_float8, refuse_missing_float8
from nlm.init import init
from nlm.kernels.rows import default_rows
from nlm.layout import layout_problems, whole_logits
from nlm.mesh import Mesh
from nlm.model import Part, Transformer
from nlm.norms import NORMS
from nlm.norms.batch import BatchStatistics
from nlm.optim import OPTIMIZERS
from nlm.parallel.compile import compile_model, refuse_missing_kernels
from nlm.parallel.engine import Engine, Inference, WholeEngine
from nlm.parallel.pipeline import PipelineEngine, split, stages_of
from nlm.parallel.recompute import recompute
from nlm.parallel.shard import shard
from nlm.parallel.tensor import Ranks, TensorParallel
from nlm.schemes import SCHEMES
from nlm.schemes.base import Learned, Scheme, Slot, Slots, scaled
from nlm.schemes.inits import INITS, LSUV
from nlm.scores import SCORES
from nlm.weight_norms import WEIGHT_NORMS, MakeWeightNorm, NormLoss, SpectralRegularization

CALIBRATION_ROWS = 8
"""Of random tokens, as long as the context of training."""


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
    if config is not None and not problems:
        problems += [*_overruled(config.model), *_leaks(config), *_not_replaceable(config)]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def build_model(config: Config, seed: int | None = None, device: str | torch.device = "cpu") -> Transformer:
    """The whole model of a config in float32, materialized and initialized; `seed` defaults to train.seed."""
    seed = config.train.seed if seed is None else seed
    return init(design(config).to_empty(device=device), seed, calibration(config, seed))


def design(
    config: Config, tp: TensorParallel | None = None, part: Part | None = None, data: tuple[Ranks, ...] = ()
) -> Transformer:
    """The model or a part of its stack, of it what a tensor parallel rank holds, without memory of its own yet."""
    model = config.model
    scheme = _scheme(model)
    score = partial(SCORES[model.attention.score], **model.attention.fields)
    norm = partial(NORMS[model.norm.name], **model.norm.fields)
    slots = token_scale if NORMS[model.norm.name].token_scale else None
    with torch.device("meta"):
        return Transformer(
            model,
            config.train.seq_len,
            scheme,
            norm,
            score,
            _weight_norms(model.weight_norm),
            slots,
            tp,
            part,
            data,
            config.source_len,
        )


def _scheme(model: ModelConfig) -> Scheme:
    scheme = SCHEMES[model.scheme.name](**model.scheme.fields)
    return scheme if model.init is None else INITS[model.init.name](scheme, **model.init.fields)


def calibration(config: Config, seed: int) -> dict[str, float | Tensor]:
    """What depends on what comes out of the layers before, where the init or the norm has such."""
    scheme = _scheme(config.model)
    target = scheme.target if isinstance(scheme, LSUV) else None
    if target is None and not NORMS[config.model.norm.name].calibrates:
        return {}
    generator = torch.Generator().manual_seed(seed)
    model = config.model
    tokens = torch.randint(model.vocab_size, (CALIBRATION_ROWS, config.train.seq_len), generator=generator)
    source = None
    if model.reads_source:
        source = torch.randint(model.n_tokens, (CALIBRATION_ROWS, config.source_len), generator=generator)
    return calibrated(lambda part: design(config, part=part), tokens, seed, target, source)


def token_scale(site: Site) -> Slots:
    return {"token": Slot(scaled, scale=Learned((), site.dim**0.5))} if site.kind == "stack" else {}


def _weight_norms(choice: WeightNormChoice | None) -> dict[Role, MakeWeightNorm]:
    if choice is None:
        return {}
    return {Role(role): partial(WEIGHT_NORMS[choice.name], **choice.fields) for role in choice.roles}


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """What trains the model in the layout of the config, with this rank's parts of it, initialized."""
    parallel = config.parallel
    _refuse_missing(config, mesh)
    whole = design(config, mesh.tp, data=mesh.data)
    values = calibration(config, config.train.seed)
    if parallel.pp > 1:
        parts = split(config.model, config.train.seq_len, parallel.n_stages, config.source_len)
        stages = stages_of(mesh.rank("pp"), parallel)
        models = [prepare(design(config, mesh.tp, parts[stage]), config, mesh, values) for stage in stages]
        return PipelineEngine(config, mesh, models, whole, stages)
    model = prepare(whole, config, mesh, values)
    if parallel.engine == "deepspeed":
        from nlm.parallel.deepspeed import DeepSpeedEngine  # an optional extra, imported only when chosen

        return DeepSpeedEngine(config, mesh, model)
    return WholeEngine(config, mesh, model)


def build_inference(config: Config, mesh: Mesh) -> Inference:
    """The model in the layout of the config, which has no pipeline, without what training takes; initialized."""
    _refuse_missing(config, mesh)
    values = calibration(config, config.train.seed)
    model = prepare(design(config, mesh.tp, data=mesh.data), config, mesh, values)
    return Inference(config, mesh, [model], model)


def _refuse_missing(config: Config, mesh: Mesh) -> None:
    """Errors: ValueError for kernels or float8 that cannot be had here."""
    refuse_missing_kernels(config.parallel, mesh.device)
    refuse_missing_float8(config.train.precision, mesh.device, print if mesh.speaks else None)


def prepare(model: Transformer, config: Config, mesh: Mesh, values: Mapping[str, float | Tensor]) -> Transformer:
    """Sharded, materialized, initialized, recomputed and compiled as the config has it."""
    if config.train.precision == "fp64":
        model.double()
    shard(model, config.parallel, mesh)
    init(model.to_empty(device=mesh.device), config.train.seed, values)
    model.cross_entropy.sparse_k = config.train.sparse_softmax_k
    model.cross_entropy.smoothing = config.train.label_smoothing
    model.loss_rows = loss_rows(config)
    if config.train.precision == "fp8":
        multiply_in_float8(model, emulate=mesh.device.type == "cpu")
    recompute(model, config.parallel.recompute)
    if config.parallel.compile:
        compile_model(
            model,
            kernels=config.parallel.kernels,
            say=print if mesh.speaks else None,
            dynamic=config.data.has_pairs,
        )
    return model


def loss_rows(config: Config, tokens: int | None = None) -> int | None:
    """Of how many positions of a microbatch of `tokens`, the config's by default, there are logits at a time; None: of
    all."""
    parallel, model = config.parallel, config.model
    if whole_logits(parallel):
        return None
    tokens = tokens or config.train.batch_tokens // parallel.data_ranks // parallel.microbatches
    return parallel.loss_rows or default_rows(tokens, model.dim, model.vocab_size // parallel.tp)


def _bad_choices(model: Mapping[str, Any]) -> Iterable[str]:
    yield from _bad_choice("model.scheme", model.get("scheme"), SCHEMES)
    yield from _bad_choice("model.init", model.get("init"), INITS)
    yield from _bad_choice("model.norm", model.get("norm"), NORMS)
    if isinstance(attention := model.get("attention", {}), dict):
        yield from _bad_choice("model.attention", {"score": AttentionChoice().score} | attention, SCORES, "score")
    yield from _bad_choice("model.weight_norm", model.get("weight_norm"), WEIGHT_NORMS, also=("roles",))


def _overruled(model: ModelConfig) -> Iterable[str]:
    """What the scheme rules out: an init beside its own, weight norms that would do nothing or have no direction."""
    scheme = SCHEMES[model.scheme.name](**model.scheme.fields)
    if model.reads_source and (lacks := scheme.lacks_two_stacks):
        yield f"model.architecture: 'encoder_decoder' is not defined by the scheme {model.scheme.name!r}: {lacks}"
    if model.init and not scheme.leaves_init_open:
        yield f"model.init: the scheme has an init of its own, which makes it what it is; remove {model.init.name!r}"
    if model.init and model.init.name == "lsuv" and model.weight_norm:
        yield "model.weight_norm: what LSUV scales, a weight norm would undo; remove one of the two"
    for role in model.weight_norm.roles if model.weight_norm else []:
        kind: Kind = "ffn" if role in {"gate", "up", "down"} else "attn"
        site = None if role in {"embed", "head"} else Site(0, model.n_layers, kind, model.dim)
        weight = Weight(Role(role), (model.dim, model.dim), site, model.n_layers)
        if role == "head" and model.tied:
            yield "model.weight_norm.roles: a tied model has no head; its table is 'embed'"
        elif scheme.weight_norm(weight):
            yield f"model.weight_norm.roles: the scheme has its own norm of {role!r}; leave it out"
        elif scheme.std(weight) == 0:
            yield f"model.weight_norm.roles: in this scheme {role!r} starts at 0, which has no direction; leave it out"


def _leaks(config: Config) -> Iterable[str]:
    """Norms by the statistics of batches where there is no such batch, or where it holds what is to be predicted."""
    model, name = config.model, config.model.norm.name
    norm, published = NORMS[name], config.model.norm.fields.get("published")
    if not issubclass(norm, BatchStatistics):
        return
    if model.reads_source:
        yield (
            f"model.norm: {name!r} takes statistics of all positions of a batch, of which an encoder_decoder's padding "
            "would be a part; set another norm"
        )
        return
    if norm.has_causal_form and not (model.is_encoder if published is None else published):
        return
    if not model.is_encoder:
        causal = " model.norm.published = false" if norm.has_causal_form else " another norm"
        yield (
            f"model.norm: as published, {name!r} takes statistics of a whole batch; a decoder would learn from them of "
            f"the tokens that it is to predict; set{causal}, or model.architecture = 'encoder'"
        )
    if config.parallel.microbatches > 1:
        yield (
            f"parallel.microbatches: as published, {name!r} takes statistics of a whole batch, of which a microbatch "
            f"is not one; set parallel.microbatches = 1, for which lower train.batch_tokens or add data parallel ranks"
        )


def _not_replaceable(config: Config) -> Iterable[str]:
    """Hidden units where the zeros of a new one would not stay zeros, nor its weights what they are."""
    model, key = config.model, "optim.continual_backprop"
    if config.optim.continual_backprop is None:
        return
    scheme, site = SCHEMES[model.scheme.name](**model.scheme.fields), Site(0, model.n_layers, "ffn", model.dim)
    up, down = (model.ffn_dim, model.dim), (model.dim, model.ffn_dim)
    shapes = {"up": up} | ({"gate": up} if model.gated else {}) | {"down": down}
    weights = {role: Weight(Role(role), shape, site, model.n_layers) for role, shape in shapes.items()}
    if scheme.unit_axis(weights["down"]) == 0:
        yield (
            f"{key}: the scheme keeps every hidden unit's column of 'down' at norm 1, and a new unit's is 0, which has "
            f"no direction; remove {key}, or choose another scheme"
        )
    if own := [role for role, weight in weights.items() if scheme.weight_norm(weight)]:
        yield (
            f"{key}: the scheme has a norm of its own of {', '.join(own)}, which would make something else of a new "
            f"unit's weights; remove {key}, or choose another scheme"
        )
    norm = model.weight_norm
    changes = norm and not issubclass(WEIGHT_NORMS[norm.name], NormLoss | SpectralRegularization)
    if norm and changes and (roles := [role for role in norm.roles if role in weights]):
        yield (
            f"model.weight_norm.roles: {norm.name!r} of {', '.join(roles)} would make something else of the weights of "
            f"a new unit of {key}; leave them out, or choose norm_loss or spectral_regularization"
        )


def _bad_optimizer(optim: Any) -> Iterable[str]:
    if isinstance(optim, Mapping):
        own = {k: v for k, v in optim.items() if k == "name" or k not in OptimConfig.model_fields}
        yield from _bad_choice("optim", {"name": OptimConfig.model_fields["name"].default} | own, OPTIMIZERS)


def _bad_choice(
    key: str, table: Any, choices: Mapping[str, type], selector: str = "name", also: Collection[str] = ()
) -> Iterable[str]:
    """Problems of a choice by name: of the name, and of the fields but those that are `also` in the table."""
    table = {selector: table} if isinstance(table, str) else table
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
        Fields.model_validate({k: v for k, v in table.items() if k != selector and k not in also})
    except ValidationError as error:
        yield from describe(error.errors(), prefix=f"{key}.")
