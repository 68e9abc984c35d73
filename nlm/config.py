"""Every config class, and how a TOML file and dotted overrides become one. Torch-free.

A file may name others in `extends` (a path or a list, relative to the file); later files win over earlier
ones, the file itself over what it extends, and overrides `a.b=value` over all.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

Table = dict[str, Any]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
"""How much of an average is left after a step: the first moment's, the second's."""


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line a problem: key, what was expected, what came."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Choice(Section):
    """A choice by name; the other keys are the chosen one's own fields, checked where the name is looked up."""

    model_config = ConfigDict(extra="allow")

    @property
    def fields(self) -> Table:
        return self.model_extra or {}


class NamedChoice(Choice):
    name: str


class AttentionChoice(Choice):
    score: str = "softmax"


Matrix = Literal["embed", "q", "k", "v", "o", "gate", "up", "down", "head"]
"""A role of matrices, by name."""

GATED = frozenset({"swiglu", "geglu"})
"""Activations of a feed-forward sublayer that has a third matrix, the gate."""


class WeightNormChoice(NamedChoice):
    """`roles`: of the matrices that have it."""

    roles: list[Matrix] = Field(default=["q", "k", "v", "o", "gate", "up", "down"], min_length=1)


def _named(value: Any) -> Any:
    """A name alone is a choice that leaves its fields as they are."""
    return {"name": value} if isinstance(value, str) else value


class ModelConfig(Section):
    """Left out, `n_kv_heads` is n_heads, `head_dim` dim / n_heads, and `ffn_dim` 4 · dim, or 8/3 · dim rounded
    up to a multiple of 8 for the gated activations, which have a third matrix. `bias` is for linear layers and
    for the norms that have one, but not for the head, which has `head_bias`. `norm` is a name, or a table of a name and
    the norm's own fields; `init`, for schemes that have none of their own, and `weight_norm` likewise, this with the
    roles of the matrices that have it.

    An "encoder" sees the whole text, and learns tokens that are masked (see data/masked.py). Its mask is the last token
    of the vocabulary, one more than the data may have.

    An "encoder_decoder" reads a source with an encoder of `n_encoder_layers` layers, by default as many as `n_layers`,
    those of the decoder, which attends to what the encoder makes of it. Both share the embedding. What fills rows that
    are shorter than others is the last token of the vocabulary, one more than the data may have, too.

    `stochastic_depth` is the share of the samples for which the last layer drops each sublayer in training; that of the
    others grows to it evenly from 0 at the first. `logits_cap` bounds the logits by cap · tanh(logits / cap).
    """

    vocab_size: PositiveInt
    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_dim: PositiveInt
    activation: Literal["gelu", "relu", "relu2", "silu", "swiglu", "geglu"] = "gelu"
    bias: bool = False
    head_bias: bool = False
    tied: bool = False
    norm: Annotated[NamedChoice, BeforeValidator(_named)] = NamedChoice(name="layernorm")
    norm_eps: PositiveFloat = 1e-5
    position: Literal["rope", "rope_interleaved", "learned", "sinusoidal", "none"] = "rope"
    rope_base: PositiveFloat = 10_000.0
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    n_encoder_layers: PositiveInt | None = None
    scheme: NamedChoice
    init: Annotated[NamedChoice, BeforeValidator(_named)] | None = None
    attention: AttentionChoice = AttentionChoice()
    weight_norm: Annotated[WeightNormChoice, BeforeValidator(_named)] | None = None
    stochastic_depth: float = Field(default=0.0, ge=0, lt=1)
    logits_cap: PositiveFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        dim, heads = table.get("dim"), table.get("n_heads")
        derived: Table = {}
        if _positive(heads):
            derived["n_kv_heads"] = heads
        if _positive(dim) and _positive(heads) and dim % heads == 0:
            derived["head_dim"] = dim // heads
        if _positive(dim):
            gated = table.get("activation") in GATED
            derived["ffn_dim"] = -(-8 * dim // 24) * 8 if gated else 4 * dim
        if table.get("architecture") == "encoder_decoder" and table.get("n_encoder_layers") is None:
            derived["n_encoder_layers"] = table.get("n_layers")
            table = {key: value for key, value in table.items() if key != "n_encoder_layers"}
        return derived | table

    @property
    def is_encoder(self) -> bool:
        return self.architecture == "encoder"

    @property
    def reads_source(self) -> bool:
        return self.architecture == "encoder_decoder"

    @property
    def n_all_layers(self) -> int:
        """Of both stacks, where there are two."""
        return self.n_layers + (self.n_encoder_layers or 0)

    @property
    def n_tokens(self) -> int:
        """How many tokens the data may have."""
        return self.vocab_size - (self.is_encoder or self.reads_source)

    @property
    def padding(self) -> int:
        """The token that fills rows of an encoder–decoder."""
        return self.vocab_size - 1

    @property
    def gated(self) -> bool:
        return self.activation in GATED


class TrainConfig(Section):
    """`batch_tokens` is the target tokens of one step: rows of `seq_len`, over all microbatches and ranks. `source_len`
    is the length of an encoder–decoder's sources, shorter ones filled up, by default `seq_len`.

    `precision`: "bf16" takes products in bfloat16 over float32 weights; "fp8" does too, but those of the blocks'
    matrices in float8, on GPUs that can; "fp64" is for proofs. A run ends early, with a checkpoint from which it goes
    on, after the step `stop_after`, and when it has taken `max_minutes`.

    `sparse_softmax_k`: the training loss is that of a softmax over the k largest logits only. It is lower than the true
    one, by which validation goes. `label_smoothing`: of each target in training, the share that is spread evenly over
    the vocabulary. `masked_share`: of the tokens, those that an encoder is to predict.

    `start`: a checkpoint with whose weights the run begins, in the place of random ones; nothing else is taken from it.
    `preflight`: whether ranks, hosts and links are tested before.
    """

    steps: PositiveInt
    preflight: bool = False
    start: str | None = None
    stop_after: PositiveInt | None = None
    max_minutes: PositiveFloat | None = None
    batch_tokens: PositiveInt
    seq_len: int = Field(ge=2)
    source_len: int | None = Field(default=None, ge=2)
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16", "fp8", "fp64"] = "fp32"
    sparse_softmax_k: PositiveInt | None = None
    label_smoothing: Fraction = 0.0
    masked_share: float = Field(default=0.15, gt=0, le=1)


class ContinualBackpropConfig(Section):
    """At each update the share `replacement_rate` of the hidden units that are older than `maturity` updates is
    replaced, those whose utility, an average that keeps `decay` of itself, is lowest."""

    replacement_rate: float = Field(default=1e-4, gt=0, lt=1)
    maturity: NonNegativeInt = 100
    decay: Fraction = 0.99


class OptimConfig(Choice):
    """The optimizer `name`, what is done to the gradients before it, and the schedule: linear warmup to `lr`, then
    `schedule` down to `final_lr_frac` · lr. The other keys are the optimizer's own, such as `betas`.

    `clip` is the largest global gradient norm, `agc` the largest norm of a row's gradient over that of the row, 0 for
    none; `centralize` takes the mean out of each row. `decay_frac` is the share of all steps in which "wsd" (warmup,
    stable, decay) decays. With a table `continual_backprop`, hidden units that are of little use are replaced.
    """

    name: str = "adamw"
    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.1
    clip: NonNegativeFloat = 1.0
    agc: NonNegativeFloat = 0.0
    centralize: bool = False
    continual_backprop: ContinualBackpropConfig | None = None
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_frac: float = Field(default=0.2, gt=0, le=1)
    final_lr_frac: float = Field(default=0.1, ge=0, le=1)


class ParallelConfig(Section):
    """The layout: pp · dp_replicate · dp_shard · tp ranks. It changes the time a step takes, not its numbers.

    `dp_replicate` ranks each take a part of every batch (DDP); `dp_shard` ranks do, and hold a part of every
    parameter, gradient and optimizer state (FSDP2; with both, HSDP), gathered `blocks_per_unit` at a time and
    dropped again after the forward if `reshard` (by default a 40th of the stack, else a 10th). `tp` ranks divide
    heads, hidden units and vocabulary, under `sequence_parallel` also the stream between. `pp` ranks hold a part of
    the layers each, of which "interleaved" makes `stages_per_rank` parts a rank (by default 2), "zbv" and
    "dualpipev" two.

    `engine = "deepspeed"` has DeepSpeed do the data parallelism: `zero = 0` over dp_replicate, 1 (optimizer
    state), 2 (and gradients) or 3 (and parameters; with `offload` in CPU memory) over dp_shard.

    `microbatches`: a step's rows go through the model in this many parts.

    `recompute`: what of the layers is not kept for the backward but computed again there. "none"; all but matrix
    products, attention and collectives, "selective"; of each "block" all but its input; of "sqrt"(L) blocks in a row
    all but the first's input, which takes a block's memory times that; all but the blocks' inputs, which wait in the
    host's memory, "offload"; or, "nested", of each half of the stack, and of each half of a half, down to blocks, which
    computes a layer up to log L times. "auto" is the first of these that `nlm plan` expects to need no more than
    `memory_gib` on a rank, by default nine tenths of a GPU's.

    `compile` makes one graph of a block, in which `kernels` says whose kernels compute residuals, norms and rotary
    positions: Inductor's own, or nlm's in Triton (nlm.kernels), which then has the update of AdamW too.

    `loss_rows`: of how many positions of a microbatch there are logits at a time (by default as many as take the memory
    of its stream; always of all under zero = 3, "zbv" and "dualpipev").
    """

    engine: Literal["torch", "deepspeed"] = "torch"
    dp_replicate: PositiveInt = 1
    dp_shard: PositiveInt = 1
    blocks_per_unit: PositiveInt | None = None
    reshard: bool = True
    tp: PositiveInt = 1
    sequence_parallel: bool = False
    pp: PositiveInt = 1
    schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    stages_per_rank: PositiveInt | None = None
    zero: Literal[0, 1, 2, 3] | None = None
    offload: bool = False
    microbatches: PositiveInt = 1
    recompute: Literal["none", "selective", "block", "sqrt", "offload", "nested", "auto"] = "none"
    memory_gib: PositiveFloat | None = None
    loss_rows: PositiveInt | None = None
    compile: bool = False
    kernels: Literal["inductor", "triton"] = "inductor"

    @property
    def ranks(self) -> int:
        return self.pp * self.data_ranks * self.tp

    @property
    def data_ranks(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def n_stages(self) -> int:
        match self.schedule:
            case "1f1b":
                return self.pp
            case "interleaved":
                return self.pp * (self.stages_per_rank or 2)
            case "zbv" | "dualpipev":
                return self.pp * 2


class SourceConfig(Section):
    """One source of a mixture: token shards at `path`, the prefix of a Megatron `.bin/.idx` pair as `nlm tokenize`
    writes them or a directory of pairs; or text `files` (paths, patterns and URLs of one format), tokenized on the way.

    `weight` is its share of the rows, by default that of its tokens in all shards. Of files, `text_field` names the
    text of a JSON line or a Parquet row, `shuffle` is the number of rows that are shuffled together, and `workers` of
    the processes that tokenize.
    """

    path: str | None = None
    files: list[str] | None = Field(default=None, min_length=1)
    weight: PositiveFloat | None = None
    tokenizer: str | None = None
    text_field: str = "text"
    shuffle: PositiveInt = 256
    workers: NonNegativeInt = 1

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.path is None) == (self.files is None):
            raise ValueError("expected a path to shards or text files, one of the two")
        if self.files is not None and (self.tokenizer is None or self.weight is None):
            raise ValueError("expected a tokenizer and a weight for text files, whose length is not known")
        own = {name: field.default for name, field in type(self).model_fields.items() if name not in ("path", "weight")}
        idle = [name for name, default in own.items() if self.path is not None and getattr(self, name) != default]
        if idle:
            raise ValueError(f"{', '.join(idle)}: of text files only; shards are tokenized already")
        return self


PAIR_WIDTH = 8
"""Rows of pairs are filled up to multiples of it: few shapes, which tensor parallel ranks can divide."""


class TranslationConfig(Section):
    """Pairs of texts for an encoder–decoder: token shards PATH.de, PATH.en and so on, a `languages` each, of which
    document i says the same, or nothing, as `nlm tokenize --languages` writes them.

    `directions`, such as "de-en", or "*-en" of all others into one, are by default all between two languages. One of n
    pairs comes as often as n to the power of 1 / `temperature`.
    """

    path: str
    languages: list[Annotated[str, Field(pattern=r"^\w+$")]] = Field(min_length=2)
    directions: list[str] | None = Field(default=None, min_length=1)
    temperature: float = Field(default=1.0, ge=1)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Of each direction, the language of the source and that of the target."""
        return [pair for name in self.directions or ["*-*"] for pair in self._named(name)]

    def _named(self, direction: str) -> list[tuple[str, str]]:
        source, _, target = direction.partition("-")
        sources, targets = (self.languages if side == "*" else [side] for side in (source, target))
        return [(source, target) for source in sources for target in targets if source != target]

    @model_validator(mode="after")
    def _of_the_languages(self) -> Self:
        for name in self.directions or ():
            pairs = self._named(name)
            if not pairs or not {language for pair in pairs for language in pair} <= set(self.languages):
                raise ValueError(f"expected directions between two of {', '.join(self.languages)}, got {name!r}")
        every = ["-".join(pair) for pair in self.pairs]
        for names in self.languages, every:
            if len(set(names)) < len(names):
                raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
        return self


class DataConfig(Section):
    """`train`: a path to shards, several sources, or pairs to translate. `validation`: a path to shards, of pairs where
    `train` is.

    With `document_mask`, no token attends to another document or predicts its first token. `allow_changed` lets a run
    go on with other data than it began with.
    """

    train: Annotated[
        Annotated[str, Tag("path")]
        | Annotated[list[SourceConfig], Field(min_length=1), Tag("sources")]
        | Annotated[TranslationConfig, Tag("translation")],
        Discriminator(lambda value: {str: "path", list: "sources"}.get(type(value), "translation")),
    ]
    validation: str | None = None
    document_mask: bool = False
    allow_changed: bool = False

    @model_validator(mode="after")
    def _weights(self) -> Self:
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("expected a weight for every source, or, of shards only, for none")
        places = [source.path or tuple(source.files or ()) for source in self.sources]
        if again := {place for place in places if places.count(place) > 1}:
            raise ValueError(f"{again.pop()} is there twice; add the weights up")
        return self

    @property
    def has_pairs(self) -> bool:
        return isinstance(self.train, TranslationConfig)

    @property
    def sources(self) -> list[SourceConfig]:
        match self.train:
            case str() as path:
                return [SourceConfig(path=path)]
            case list() as sources:
                return sources
        return []


class CheckpointConfig(Section):
    """A checkpoint every `every` steps (0: only at the end), of which the newest `keep_last` are kept, and those of
    every `keep_every` steps (0: none)."""

    every: NonNegativeInt = 0
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0


class FaultsConfig(Section):
    """What is left out, and when to give up waiting.

    A step whose loss or gradient norm is not finite changes nothing, nor one where the loss, or the logarithm of the
    norm, is more than `sigma` standard deviations (0: any number) above the mean of the last `window` steps. After
    `rollback_after` such steps in a row the run goes back to its last checkpoint and leaves out the batches it has read
    since. When no step ends for `hang_minutes`, all ranks end, and say which of them the others wait for.
    """

    sigma: NonNegativeFloat = 6.0
    window: int = Field(default=128, ge=8)
    rollback_after: PositiveInt = 5
    hang_minutes: PositiveFloat = 30.0


class StatisticsConfig(Section):
    """Per-layer statistics on every logged step; their heat maps go to TensorBoard every `images_every` steps.

    `queries`: of each sequence, so many queries, evenly spread, show the entropy and largest logit of attention. Every
    `spectra_every` steps (0: never) singular values of the weights and effective ranks of the stream are taken, every
    `noise_every` the gradient of half the batch, from which its noise is told; each such step takes about two.
    """

    enabled: bool = True
    images_every: PositiveInt = 100
    queries: PositiveInt = 4
    spectra_every: NonNegativeInt = 0
    noise_every: NonNegativeInt = 0


def _enabled(value: Any) -> Any:
    """`statistics = false` turns them off, and leaves the other keys as they are."""
    return {"enabled": value} if isinstance(value, bool) else value


class WandbConfig(Section):
    """Weights & Biases, from `pip install 'nlm[wandb]'`."""

    project: str = "nlm"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class MlflowConfig(Section):
    """MLflow, from `pip install 'nlm[mlflow]'`; `tracking_uri` is a server or a folder, "file:…"."""

    tracking_uri: str
    experiment: str = "nlm"


class PrometheusConfig(Section):
    """An endpoint for Prometheus, from `pip install 'nlm[prometheus]'`: http://HOST:PORT/metrics of the rank that
    speaks, while it trains. Whoever reaches `host` can read it; by default only this machine does."""

    port: int = Field(default=9400, ge=1, le=65535)
    host: str = "127.0.0.1"


class LogConfig(Section):
    """`dir` is the run's folder, by default runs/NAME of the config file; a line is logged every `every` steps.

    `peak_tflops` of a rank, for MFU where the device is none of those whose peak is known. With a table `wandb` or
    `mlflow` numbers and pictures go there as well; with a table `prometheus` numbers can be asked for.
    """

    dir: str
    every: PositiveInt = 10
    tensorboard: bool = True
    peak_tflops: PositiveFloat | None = None
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    prometheus: PrometheusConfig | None = None


class EvaluateConfig(Section):
    """Validation loss over the first `batches` batches of `train.batch_tokens`, every `every` steps (0: only after
    the last). BLEU and chrF of so many `translations` of each direction, of pairs (0: none)."""

    every: NonNegativeInt = 0
    batches: PositiveInt = 10
    translations: NonNegativeInt = 0


class Config(Section):
    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    statistics: Annotated[StatisticsConfig, BeforeValidator(_enabled)] = StatisticsConfig()
    log: LogConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def batch_rows(self) -> int:
        return self.train.batch_tokens // self.train.seq_len

    @property
    def source_len(self) -> int:
        return self.train.source_len or self.train.seq_len

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @classmethod
    def parse(cls, table: Table) -> Self:
        """Errors: ConfigError with every problem, those that span several keys included."""
        try:
            config = cls.model_validate(table)
        except ValidationError as error:
            # A derived key is missing only where one that it derives from is wrong, which is a problem of its own.
            derived = [("model", key) for key in ("n_kv_heads", "head_dim", "ffn_dim")]
            own = (p for p in error.errors() if not (p["type"] == "missing" and p["loc"] in derived))
            raise ConfigError([*describe(own), *_contradictions(table)]) from None
        if problems := list(_contradictions(config.model_dump())):
            raise ConfigError(problems)
        return config


def read_table(path: str | Path, overrides: Iterable[str] = ()) -> Table:
    """The merged, not yet validated table of a config file. Errors: ConfigError."""
    path = Path(path)
    table = overridden(read_file(path), overrides)
    return _merge({"log": {"dir": f"runs/{path.stem}"}}, table)


def overridden(table: Table, overrides: Iterable[str]) -> Table:
    """With "a.b=value" in the place of what the table has. Errors: ConfigError for one that is not of that form."""
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"{override}: expected an override of the form section.key=value")
            continue
        leaf: Any = _parse_value(value)
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        table = _merge(table, leaf)
    if problems:
        raise ConfigError(problems)
    return table


def describe(problems: Iterable[ErrorDetails], prefix: str = "") -> Iterable[str]:
    """One line a problem: the key, what was expected, what came."""
    for problem in problems:
        key = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{key}: unknown key; remove it or correct its name"
        elif problem["type"] == "missing":
            yield f"{key}: missing; give it a value"
        else:
            yield f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}; got {problem['input']!r}"


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean …?' for a misspelt name, or the whole choice when nothing is near."""
    names = sorted(names)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested table, under its dotted key."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _contradictions(table: Table) -> Iterable[str]:
    """Problems between keys. A key that is missing or of the wrong type is another check's business."""

    def number(section: str, key: str) -> int | None:
        value = table[section].get(key) if isinstance(table.get(section), dict) else None
        return value if _positive(value) else None

    dim, heads, kv = number("model", "dim"), number("model", "n_heads"), number("model", "n_kv_heads")
    head_dim = number("model", "head_dim")
    if dim and heads and not head_dim and dim % heads:
        fits = [h for h in range(1, dim + 1) if dim % h == 0]
        yield (
            f"model.n_heads: expected a divisor of model.dim = {dim} (one of {fits}), got {heads}; "
            "or set model.head_dim"
        )
    if heads and kv and heads % kv:
        fits = [k for k in range(1, heads + 1) if heads % k == 0]
        yield f"model.n_kv_heads: expected a divisor of model.n_heads = {heads} (one of {fits}), got {kv}"
    model = table.get("model")
    if isinstance(model, dict) and model.get("tied") is True and model.get("head_bias") is True:
        yield "model.head_bias: a tied model has no head of its own; set tied = false, or remove it"
    width = head_dim or (dim // heads if dim and heads and dim % heads == 0 else None)
    position = model.get("position", "rope") if isinstance(model, dict) else None
    if width and width % 2 and position in {"rope", "rope_interleaved"}:
        yield f"model.head_dim: expected an even number for model.position = {position!r}, got {width}"

    yield from _idle_keys(table)

    tokens, seq_len = number("train", "batch_tokens"), number("train", "seq_len")
    if tokens and seq_len:
        microbatches = number("parallel", "microbatches") or 1
        data_ranks = (number("parallel", "dp_replicate") or 1) * (number("parallel", "dp_shard") or 1)
        if tokens % (unit := seq_len * microbatches * data_ranks):
            yield (
                f"train.batch_tokens: expected a multiple of train.seq_len · parallel.microbatches · dp_replicate · "
                f"dp_shard = {unit}, got {tokens}"
            )
    train = table.get("train")
    if number("train", "sparse_softmax_k") and isinstance(train, dict) and train.get("label_smoothing"):
        yield "train.label_smoothing: of tokens that train.sparse_softmax_k leaves out; remove one of the two"
    data, architecture = table.get("data"), model.get("architecture") if isinstance(model, dict) else None
    if isinstance(data, dict) and isinstance(data.get("train"), dict):
        if architecture != "encoder_decoder":
            yield f"data.train: pairs to translate are for model.architecture = 'encoder_decoder', got {architecture!r}"
    elif number("evaluate", "translations"):
        yield "evaluate.translations: are of pairs to translate, data.train is text; remove it"
    if isinstance(data, dict) and data.get("document_mask") is True and architecture == "encoder_decoder":
        yield "data.document_mask: is of texts in a row; an encoder_decoder's row is one pair; remove it"
    if number("statistics", "noise_every") and tokens == seq_len:
        yield "statistics.noise_every: compares halves of a batch, which has one row only; raise train.batch_tokens"
    steps, warmup = number("train", "steps"), number("optim", "warmup_steps")
    if steps and warmup and warmup > steps:
        yield f"optim.warmup_steps: expected at most train.steps = {steps}, got {warmup}"


def _idle_keys(table: Table) -> Iterator[str]:
    """Of an encoder–decoder where there is none, or of a text where it reads pairs."""
    sections = {name: section for name in ("model", "train", "data") if isinstance(section := table.get(name), dict)}
    if sections.get("model", {}).get("architecture") == "encoder_decoder":
        return
    for section, key in (("model", "n_encoder_layers"), ("train", "source_len")):
        if sections.get(section, {}).get(key) is not None:
            yield f"{section}.{key}: is for model.architecture = 'encoder_decoder'; remove it"


def _positive(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> Table:
    """What a TOML file says, over what it extends. Errors: ConfigError."""
    if path.resolve() in seen:
        raise ConfigError([f"{path}: extends itself, by way of {' -> '.join(p.name for p in seen)}"])
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); give the path of a TOML config"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None
    bases = table.pop("extends", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError([f"{path}: extends: expected a path or a list of paths, got {bases!r}"])
    merged: Table = {}
    for base in bases:
        merged = _merge(merged, read_file(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, table)


def _merge(base: Table, top: Mapping[str, Any]) -> Table:
    """`top` over `base`, table by table. Another choice (`name` or `score`) drops the former's own fields."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            changed = any(k in value and k in old and value[k] != old[k] for k in ("name", "score"))
            shared = OptimConfig.model_fields if key == "optim" else ()
            merged[key] = _merge({k: v for k, v in old.items() if k in shared} if changed else old, value)
        else:
            merged[key] = value
    return merged


def _parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string, so that quotes need not be typed in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
