"""The command line: `nlm VERB …`.

Exit code 0 on success, 2 for a bad config or argument, 1 for a failed run, 75 for one that was asked to stop and is to
be started again.
"""

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  nlm tokenize plays/ --train-tokenizer 1024 --out data/plays
  nlm probe configs/quickstart.toml model.n_layers=200
  nlm plan configs/quickstart.toml model.dim=1024 --gpu H100 --gpus 8
  nlm train configs/quickstart.toml optim.lr=5e-4 log.dir=runs/slower
  nlm report runs/quickstart runs/slower --out pictures
"""

LAUNCHER_GRACE_S = 5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse takes no overrides behind an option
        if "overrides" not in options or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    try:
        options.run(options)
    except (FloatingPointError, OSError) as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted; the same command goes on from the last checkpoint")
    except ValueError as error:
        return _fail(2, error)
    return 0


def _fail(code: int, error: object) -> int:
    """What all ranks of a launch have to say is printed once where that is possible."""
    told = getattr(error, "told", None)  # set by nlm.parallel.launch: another rank prints the same
    if told or (told is None and os.environ.get("LOCAL_RANK", "0") != "0"):
        # A launcher ends all ranks with the first that ends: let that be the one that prints.
        time.sleep(LAUNCHER_GRACE_S)
    if told:
        return code
    for line in str(error).splitlines():
        print(f"nlm: {line}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlm",
        description="Train very deep Transformers under any normalization scheme.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # DeepSpeed's launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train, or go on training, the run of a config")
    train.add_argument("config", metavar="CONFIG", help="a TOML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, such as optim.lr=5e-4")
    train.set_defaults(run=_train)

    probe = verbs.add_parser("probe", help="see before training what the signal does at initialization")
    probe.add_argument("config", metavar="CONFIG", help="a TOML file")
    probe.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, such as optim.lr=5e-4")
    probe.add_argument("--width", type=int, default=64, metavar="N", help="probe wider models this wide (64)")
    probe.add_argument("--out", type=Path, metavar="DIR", help="writes pictures and all numbers; default: nothing")
    probe.set_defaults(run=_probe)

    plan = verbs.add_parser("plan", help="see before training what memory, arithmetic and time a config takes")
    plan.add_argument("config", metavar="CONFIG", help="a TOML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, such as parallel.tp=2")
    plan.add_argument("--gpu", metavar="NAME", help="H100, H200, A100, B200, or as torch names it: estimates time")
    plan.add_argument("--gpus", type=int, metavar="N", help="compares the layouts of so many and recommends one")
    plan.add_argument("--peak-tflops", type=float, metavar="X", help="of a GPU that is not known, dense")
    plan.add_argument("--memory-gib", type=float, metavar="X", help="likewise")
    plan.add_argument("--memory-gb-s", type=float, metavar="X", help="likewise, its bandwidth; else it does not count")
    plan.add_argument("--link-gb-s", type=float, metavar="X", help="likewise, to the GPUs of its node, one way")
    plan.add_argument("--network-gb-s", type=float, metavar="X", help="between nodes, for each GPU (50)")
    plan.add_argument("--efficiency", type=float, metavar="X", help="of kernels and collectives, of the peaks (0.7)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="writes all numbers; - for the console, without text")
    plan.set_defaults(run=_plan)

    prove = verbs.add_parser("prove-resume", help="train straight through and interrupted, and compare the two runs")
    prove.add_argument("config", metavar="CONFIG", help="a TOML file")
    prove.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, such as optim.lr=5e-4")
    prove.add_argument("--at", type=int, metavar="STEP", help="of the interruption (half of all)")
    prove.add_argument("--layout-after", metavar="tp=2,…", help="keys of [parallel] that change at the interruption")
    prove.set_defaults(run=_prove_resume)

    remove = verbs.add_parser("remove-norms", help="train a Pre-LN model on until its norms need no statistics")
    remove.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    remove.add_argument("overrides", nargs="*", metavar="key=value", help="of its config, such as optim.lr=5e-4")
    remove.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run that does it")
    remove.add_argument("--steps", type=int, metavar="N", help="2.5 times as many as the plan takes")
    remove.add_argument("--start", type=int, default=20, metavar="STEP", help="of the first norm (20)")
    remove.add_argument(
        "--gaps", type=int, nargs=3, default=(2, 2, 3), metavar="N", help="between layers: FFN, QK, V (2 2 3)"
    )
    remove.add_argument("--order", default="ffn,qk,v,final", metavar="A,B,…", help="of removal (ffn,qk,v,final)")
    remove.add_argument(
        "--auxiliary", type=float, default=0.0, metavar="W", help="weight of the loss on the stream's size (0)"
    )
    remove.set_defaults(run=_remove_norms)

    fold = verbs.add_parser("fold-norms", help="put what is linear in a Pre-LN model's norms into its linear layers")
    fold.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    fold.add_argument(
        "--out", type=Path, required=True, metavar="CHECKPOINT", help="folder of the model that comes out"
    )
    fold.set_defaults(run=_fold_norms)

    average = verbs.add_parser("average", help="write the mean of several checkpoints' weights")
    average.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="the last few of a run")
    average.add_argument(
        "--out", type=Path, required=True, metavar="CHECKPOINT", help="folder of the model that comes out"
    )
    average.set_defaults(run=_average)

    tokenize = verbs.add_parser("tokenize", help="turn text, JSONL or parquet files into a token shard")
    tokenize.add_argument("inputs", nargs="+", metavar="INPUT", help="files, or directories to search")
    how = tokenize.add_mutually_exclusive_group(required=True)
    how.add_argument("--tokenizer", metavar="byte|FILE.model|FILE.json", help="the tokenizer to use")
    how.add_argument("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train SentencePiece on the input")
    tokenize.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json (.model)")
    tokenize.add_argument("--text-field", default="text", metavar="NAME", help="of JSONL and parquet (text)")
    tokenize.add_argument("--languages", metavar="A,B,…", help="of parallel text: writes PREFIX.A.bin and so on")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tokenize.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes ({cores})")
    tokenize.set_defaults(run=_tokenize)

    report = verbs.add_parser(
        "report", help="one page of what runs did: losses, heat maps over layers, what stands out"
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: report")
    report.set_defaults(run=_report)

    verify = verbs.add_parser("verify", help="read all of a checkpoint and compare it with its checksums")
    verify.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    verify.set_defaults(run=_verify)

    schemes = verbs.add_parser("schemes", help="list the normalization schemes, with their fields")
    schemes.set_defaults(run=_schemes)
    return parser


# Each verb imports what it needs when it runs: `nlm --help` and a bad config answer at once.


def _train(options: argparse.Namespace) -> None:
    from nlm.build import load_config
    from nlm.stop import REQUEUE, Stopped
    from nlm.train import train

    faulthandler.enable(file=2)  # of a crash in native code one learns at least from where it was called
    config = load_config(options.config, options.overrides)
    try:
        train(config)
    except Stopped as stopped:
        sys.exit(_fail(REQUEUE, stopped))


def _probe(options: argparse.Namespace) -> None:
    from nlm.build import load_config
    from nlm.probe.measure import probe
    from nlm.probe.report import save, text
    from nlm.probe.verdict import judge

    seen = probe(load_config(options.config, options.overrides), options.width)
    verdict = judge(seen)
    print(text(seen, verdict))
    for path in save(seen, verdict, options.out) if options.out else ():
        print(path)


def _plan(options: argparse.Namespace) -> None:
    from nlm.build import load_config
    from nlm.plan.gpus import machine
    from nlm.plan.plan import plan
    from nlm.plan.report import text, to_json

    config = load_config(options.config, options.overrides)
    given = {
        "peak_flops": (options.peak_tflops, 1e12),
        "memory_gib": (options.memory_gib, 1),
        "memory_bandwidth": (options.memory_gb_s, 1e9),
        "link_bandwidth": (options.link_gb_s, 1e9),
        "network_bandwidth": (options.network_gb_s, 1e9),
        "efficiency": (options.efficiency, 1),
    }
    on = machine(
        options.gpu,
        config.train.precision,
        options.gpus,
        {name: value * unit for name, (value, unit) in given.items() if value is not None},
    )
    planned = plan(config, on, options.gpus)
    if options.json == Path("-"):
        print(to_json(planned))
        return
    print(text(planned))
    if options.json:
        options.json.write_text(to_json(planned) + "\n", encoding="utf-8")


def _prove_resume(options: argparse.Namespace) -> None:
    from nlm.prove import prove_resume

    if not prove_resume(options.config, options.overrides, options.at, options.layout_after):
        sys.exit(_fail(1, "the interrupted run is not the straight one"))
    print("proved")


def _remove_norms(options: argparse.Namespace) -> None:
    from nlm.remove_norms import remove_norms

    print(
        remove_norms(
            options.checkpoint,
            options.out,
            options.overrides,
            start=options.start,
            gaps=options.gaps,
            order=options.order.split(","),
            steps=options.steps,
            auxiliary=options.auxiliary,
        )
    )


def _fold_norms(options: argparse.Namespace) -> None:
    from nlm.checkpoint import load_checkpoint, save_checkpoint
    from nlm.fold import difference, folded

    model, config = load_checkpoint(options.checkpoint)
    result, its_config = folded(model, config)
    save_checkpoint(options.out, result, its_config)
    off = difference(model, result, config.train.seq_len)
    print(f"{options.out}: logits of random tokens differ by at most {off:.1e} of their standard deviation")


def _average(options: argparse.Namespace) -> None:
    from nlm.average import averaged
    from nlm.checkpoint import save_checkpoint

    save_checkpoint(options.out, *averaged(options.checkpoints))
    print(f"{options.out}: the mean of {len(options.checkpoints)} checkpoints")


def _tokenize(options: argparse.Namespace) -> None:
    from nlm.data.tokenize import tokenize, tokenize_languages

    how = options.tokenizer, options.train_tokenizer
    if options.languages:
        languages = tokenize_languages(options.inputs, options.out, options.languages.split(","), *how, options.workers)
        shards = {f"{options.out}.{language}": made for language, made in languages.items()}
    else:
        shards = {options.out: tokenize(options.inputs, options.out, *how, options.text_field, options.workers)}
    for out, made in shards.items():
        print(
            f"{out}: {made.documents:,} documents, {made.tokens:,} tokens, {made.bytes / made.tokens:.2f} bytes "
            f"a token, unigram entropy {made.unigram_entropy_nats:.3f} nats, in {made.seconds:.1f} s"
        )


def _report(options: argparse.Namespace) -> None:
    from nlm.statistics.report import report

    for picture in report(options.runs, options.out):
        print(picture)


def _verify(options: argparse.Namespace) -> None:
    from nlm.checkpoint import verify

    for checkpoint in options.checkpoints:
        verify(checkpoint)
        print(f"{checkpoint}: whole")


def _schemes(options: argparse.Namespace) -> None:
    from inspect import Parameter, signature
    from textwrap import shorten

    from nlm.norms import NORMS
    from nlm.optim import OPTIMIZERS
    from nlm.schemes import SCHEMES
    from nlm.schemes.inits import INITS
    from nlm.scores import SCORES
    from nlm.weight_norms import WEIGHT_NORMS

    choices: dict[str, Mapping[str, type]] = {
        "model.scheme.name": SCHEMES,
        "model.init": INITS,
        "model.norm": NORMS,
        "model.attention.score": SCORES,
        "model.weight_norm": WEIGHT_NORMS,
        "optim.name": OPTIMIZERS,
    }
    for key, named in choices.items():
        print(key)
        for name, chosen in named.items():
            doc = (sys.modules[chosen.__module__] if named in (SCHEMES, OPTIMIZERS) else chosen).__doc__ or ""
            summary = shorten(doc.partition("\n\n")[0], 160)
            own = [p for p in signature(chosen).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
            fields = ", ".join(p.name if p.default is Parameter.empty else f"{p.name}={p.default!r}" for p in own)
            print(f"  {name:26} {summary}" + (f"\n{'':28} fields: {fields}" if fields else ""))
