"""Which layouts a model can be trained in: everything that stands against one, each with what to type instead."""

from collections.abc import Iterator

from nlm.config import PAIR_WIDTH, Config, ParallelConfig

V_SCHEDULES = {"zbv", "dualpipev"}
"""Schedules that place weight gradients on their own; each rank holds two stages, which form a V."""


def layout_problems(config: Config) -> Iterator[str]:
    """One line a problem of a config that is otherwise valid; none for a layout that can work."""
    yield from _tensor(config)
    yield from _pipeline(config)
    yield from _data(config)
    if config.train.precision == "fp8":
        yield from _float8(config)
    if config.parallel.engine == "deepspeed":
        yield from _deepspeed(config)
    yield from _auto(config)
    if config.parallel.loss_rows and whole_logits(config.parallel):
        yield "parallel.loss_rows: under zero = 3, 'zbv' and 'dualpipev' there are logits of all positions; remove it"


def _auto(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.kernels != "inductor" and not parallel.compile:
        yield f"parallel.kernels: {parallel.kernels!r} is put into compiled blocks; set parallel.compile = true"
    is_auto = parallel.recompute == "auto"
    if parallel.memory_gib and not is_auto:
        yield f"parallel.memory_gib: is for parallel.recompute = 'auto', got {parallel.recompute!r}; remove it"
    if is_auto and parallel.engine == "deepspeed":
        yield "parallel.recompute: of DeepSpeed no memory is planned that 'auto' could go by; set another"


def whole_logits(parallel: ParallelConfig) -> bool:
    """Whether there are logits of all positions at a time: where their loss is taken of some at a time, the head's
    gradient exists before the backward, too soon to be put off, or for ZeRO-3 to divide it."""
    return parallel.zero == 3 or parallel.schedule in V_SCHEDULES


def _tensor(config: Config) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    if parallel.tp == 1:
        if parallel.sequence_parallel:
            yield "parallel.sequence_parallel: divides the stream among tensor parallel ranks; set parallel.tp > 1"
        return
    for key in ("n_heads", "n_kv_heads", "ffn_dim"):
        if (size := getattr(model, key)) % parallel.tp:
            fits = [n for n in range(1, size + 1) if size % n == 0 and model.n_kv_heads % n == 0]
            yield (
                f"parallel.tp: expected a divisor of model.{key} = {size} (for all of this model's heads: one of "
                f"{fits}), got {parallel.tp}"
            )
    if model.vocab_size < parallel.tp:
        yield f"parallel.tp: expected at most model.vocab_size = {model.vocab_size}, got {parallel.tp}"
    lengths = {"seq_len": config.train.seq_len, "source_len": config.train.source_len}
    for key, length in lengths.items():
        if parallel.sequence_parallel and length and length % parallel.tp:
            yield (
                f"train.{key}: expected a multiple of parallel.tp = {parallel.tp} under sequence_parallel, got {length}"
            )
    if parallel.sequence_parallel and config.data.has_pairs and PAIR_WIDTH % parallel.tp:
        yield (
            f"parallel.sequence_parallel: rows of pairs have multiples of {PAIR_WIDTH} tokens, which parallel.tp = "
            f"{parallel.tp} does not divide; remove it"
        )


def _pipeline(config: Config) -> Iterator[str]:
    parallel, n_layers = config.parallel, config.model.n_all_layers
    if parallel.stages_per_rank is not None and parallel.schedule != "interleaved":
        yield f"parallel.stages_per_rank: is of the interleaved schedule, not of {parallel.schedule!r}; remove it"
    if parallel.pp == 1:
        if parallel.schedule != "1f1b":
            yield f"parallel.schedule: {parallel.schedule!r} is of pipelines; set parallel.pp > 1 or remove it"
        return
    if parallel.n_stages > n_layers:
        yield (
            f"parallel.pp: {parallel.pp} ranks under {parallel.schedule!r} make {parallel.n_stages} stages, but there "
            f"are {n_layers} layers; lower parallel.pp"
        )
    if parallel.microbatches < parallel.n_stages:
        yield (
            f"parallel.microbatches: expected at least one for each of the {parallel.n_stages} stages of "
            f"{parallel.schedule!r} over {parallel.pp} ranks, got {parallel.microbatches}"
        )
    elif parallel.schedule == "interleaved" and parallel.microbatches % parallel.pp:
        yield (
            f"parallel.microbatches: the interleaved schedule goes in rounds of parallel.pp = {parallel.pp}; expected "
            f"a multiple of it, got {parallel.microbatches}"
        )
    if parallel.schedule in V_SCHEDULES and parallel.compile:
        yield (
            f"parallel.compile: {parallel.schedule!r} puts weight gradients off, which a compiled backward computes at "
            "once; set compile = false or schedule = '1f1b'"
        )


FLOAT8_MULTIPLE = 16
"""Of what the sizes of a product in float8 are to be multiples, for GPUs' kernels."""


def _float8(config: Config) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    sizes = {"dim": (1, model.dim), "ffn_dim": (parallel.tp, model.ffn_dim)}
    sizes["head_dim"] = (parallel.tp, model.n_kv_heads * model.head_dim)
    for key, (ranks, size) in sizes.items():
        if size % (FLOAT8_MULTIPLE * ranks):
            of = "n_kv_heads · head_dim" if key == "head_dim" else key
            a_rank = f" · parallel.tp = {FLOAT8_MULTIPLE * ranks}" if ranks > 1 else ""
            yield f"model.{key}: 'fp8' expects {of} to be a multiple of {FLOAT8_MULTIPLE}{a_rank}, got {size}"
    if config.data.has_pairs:
        yield (
            f"train.precision: 'fp8' expects a multiple of {FLOAT8_MULTIPLE} tokens in a microbatch; one of pairs has "
            "as many as they make; set precision = 'bf16'"
        )
    tokens = config.batch_rows // parallel.data_ranks // parallel.microbatches * config.train.seq_len
    if tokens % FLOAT8_MULTIPLE:
        yield (
            f"train.seq_len: 'fp8' expects a multiple of {FLOAT8_MULTIPLE} tokens in a microbatch, got {tokens}; set a "
            f"multiple of {FLOAT8_MULTIPLE}"
        )
    if parallel.schedule in V_SCHEDULES:
        yield (
            f"train.precision: {parallel.schedule!r} puts off the weight gradients of products that are not in float8; "
            "set precision = 'bf16' or schedule = '1f1b'"
        )


def _data(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if config.evaluate.translations and parallel.ranks > parallel.dp_replicate:
        yield "evaluate.translations: needs a whole model on a rank; set 0, and use `nlm evaluate`"
    torch_sharded = parallel.engine == "torch" and parallel.dp_shard > 1
    if not torch_sharded:
        for key in ("blocks_per_unit", "reshard"):
            if getattr(parallel, key) != type(parallel).model_fields[key].default:
                yield f"parallel.{key}: is of FSDP2, which engine = 'torch' with dp_shard > 1 uses; remove it"
    if parallel.engine == "torch":
        for key in ("zero", "offload"):
            if getattr(parallel, key) != type(parallel).model_fields[key].default:
                yield f"parallel.{key}: is DeepSpeed's; set parallel.engine = 'deepspeed' or use dp_shard"


def _deepspeed(config: Config) -> Iterator[str]:
    parallel = config.parallel
    zero = parallel.zero or 0
    if parallel.pp > 1:
        yield (
            "parallel.pp: under DeepSpeed a pipeline is a model of its own kind (PipelineModule), which ZeRO 2 and 3 "
            "refuse; set pp = 1, or engine = 'torch', which pipelines with dp_shard"
        )
    if config.train.precision == "fp64":
        yield "train.precision: DeepSpeed's optimizers keep float32; set fp32 or bf16"
    if zero == 0 and parallel.dp_shard > 1:
        yield "parallel.dp_shard: ZeRO 0 replicates; set parallel.zero = 1, 2 or 3, or dp_replicate in its place"
    if zero > 0 and parallel.dp_replicate > 1:
        yield f"parallel.dp_replicate: ZeRO {zero} divides over dp_shard; put all data parallel ranks there"
    if parallel.offload and zero != 3:
        yield f"parallel.offload: is for parallel.zero = 3, got {zero}"
