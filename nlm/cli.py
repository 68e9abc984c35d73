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

from nlm.parallel.ranklog import complain, keep_lines, keep_traceback

EXAMPLES = """\
examples:
  nlm tokenize plays/ --train-tokenizer 1024 --out data/plays
  nlm probe configs/quickstart.toml model.n_layers=200
  nlm plan configs/quickstart.toml model.dim=1024 --gpu H100 --gpus 8
  nlm train configs/quickstart.toml optim.lr=5e-4 log.dir=runs/slower
  nlm generate runs/slower/checkpoints/step-00000100 "To be" --max-tokens 40
  nlm report runs/quickstart runs/slower --out pictures
"""

LAUNCHER_GRACE_S = 5


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.run(options)
    except (FloatingPointError, OSError) as error:
        keep_traceback()
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted; the same command goes on from the last checkpoint")
    except ValueError as error:
        keep_traceback()
        return _fail(2, error)
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What a command line asks for. Errors: SystemExit, as argparse has it."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse takes no overrides, prompts or texts behind an option
        many = [name for name in ("overrides", "prompts", "texts") if name in options]
        if not many or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        setattr(options, many[0], [*getattr(options, many[0]), *rest])
    return options


def _fail(code: int, error: object) -> int:
    """What all ranks of a launch have to say is printed once where that is possible."""
    told = getattr(error, "told", None)  # set by nlm.parallel.launch: another rank prints the same
    if told or (told is None and os.environ.get("LOCAL_RANK", "0") != "0"):
        # A launcher ends all ranks with the first that ends: let that be the one that prints.
        time.sleep(LAUNCHER_GRACE_S)
    if told:
        return code
    complain(str(error))
    return code


def make_parser() -> argparse.ArgumentParser:
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

    launch = verbs.add_parser("launch", help="train on a cluster: by ssh, Slurm, Kubernetes, MPI or DeepSpeed")
    launch.add_argument("config", metavar="CONFIG", help="a TOML file")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, such as parallel.dp_shard=16")
    launch.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="such as configs/clusters/ssh.toml")
    launch.add_argument("--sweep", type=Path, metavar="FILE", help="of overrides, a line a run: a Slurm array")
    launch.add_argument("--dry-run", action="store_true", help="prints the commands instead of running them")
    launch.set_defaults(run=_launch)

    preflight = verbs.add_parser("preflight", help="see before training whether ranks, hosts and links can carry it")
    preflight.add_argument("config", metavar="CONFIG", help="a TOML file")
    preflight.add_argument("overrides", nargs="*", metavar="key=value", help="dotted, such as parallel.tp=2")
    preflight.set_defaults(run=_preflight)

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

    generate = verbs.add_parser("generate", help="write on from prompts with a trained decoder")
    generate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to go on from; default: lines of stdin")
    generate.add_argument(
        "--file", type=Path, metavar="FILE", help='of prompts: a line each, or .jsonl of strings or {"prompt": …}'
    )
    generate.add_argument("--max-tokens", type=int, metavar="N", help="of each text (to the end of the context)")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token (1)")
    generate.add_argument("--top-k", type=int, metavar="K", help="draws from the K likeliest tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="from the fewest that together have probability P")
    generate.add_argument("--seed", type=int, metavar="N", help="of chance (0)")
    generate.add_argument("--n", type=int, default=1, metavar="N", help="texts a prompt (1)")
    generate.add_argument("--beams", type=int, metavar="N", help="beam search with so many")
    generate.add_argument("--length-penalty", type=float, metavar="A", help="α of beam search (0)")
    generate.add_argument("--batch", type=int, default=32, metavar="N", help="prompts computed at once (32)")
    generate.add_argument("--tokenizer", metavar="byte|FILE.model|FILE.json", help="default: that of the run's data")
    generate.add_argument("--json", action="store_true", help="writes a line of JSON a text")
    generate.set_defaults(run=_generate)

    translate = verbs.add_parser("translate", help="translate texts with a trained encoder-decoder")
    translate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    translate.add_argument("texts", nargs="*", metavar="TEXT", help="in any of the languages; default: lines of stdin")
    translate.add_argument("--to", required=True, metavar="LANGUAGE", help="such as de")
    translate.add_argument("--file", type=Path, metavar="FILE", help="of texts: a line each, or .jsonl of strings")
    translate.add_argument("--beams", type=int, default=4, metavar="N", help="of beam search (4)")
    translate.add_argument("--length-penalty", type=float, default=0.6, metavar="A", help="α of beam search (0.6)")
    translate.add_argument("--batch", type=int, default=64, metavar="N", help="texts computed at once (64)")
    translate.add_argument("--tokenizer", metavar="FILE.model|FILE.json", help="default: that of the run's data")
    translate.set_defaults(run=_translate)

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

    export = verbs.add_parser("export", help="write a checkpoint's model for transformers, Megatron or plain torch")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    export.add_argument("out", metavar="OUT", help="a folder that is not there yet")
    export.add_argument(
        "--format", default="huggingface", metavar="NAME", help="huggingface (default), megatron, torch"
    )
    export.add_argument("--tokenizer", metavar="NAME", help="byte, FILE.model, FILE.json or none; default: the data's")
    export.set_defaults(run=_export)

    import_ = verbs.add_parser("import", help="make a checkpoint of a Hugging Face folder")
    import_.add_argument("folder", metavar="DIR", help="config.json and safetensors")
    import_.add_argument("out", metavar="OUT", help="the checkpoint, a folder that is not there yet")
    import_.add_argument("overrides", nargs="*", metavar="key=value", help="of its config, such as train.seq_len=2048")
    import_.set_defaults(run=_import)

    report = verbs.add_parser(
        "report", help="one page of what runs did: losses, heat maps over layers, what stands out"
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: report")
    report.set_defaults(run=_report)

    evaluate = verbs.add_parser("evaluate", help="losses of checkpoints on text, and tasks of lm-evaluation-harness")
    evaluate.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100, or RUN: all of its"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="of [parallel], or train.precision")
    _add_text(evaluate)
    evaluate.add_argument("--window", type=int, metavar="N", help="tokens of context at most (train.seq_len)")
    evaluate.add_argument("--stride", type=int, metavar="N", help="from a window to the next (half a window)")
    evaluate.add_argument("--tokens", type=int, metavar="N", help="predicts only the first so many of the data")
    evaluate.add_argument("--tasks", type=_comma_list, default=(), metavar="A,B,…", help="of lm-evaluation-harness")
    evaluate.add_argument("--include-path", metavar="DIR", help="of the YAML files of tasks; no others are known then")
    evaluate.add_argument("--limit", type=int, metavar="N", help="examples of a task")
    evaluate.add_argument("--rows", type=int, metavar="N", help="windows at a time on a rank (a microbatch's)")
    evaluate.add_argument("--follow", action="store_true", help="goes on with what a RUN saves until it ends")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="instead of RUN/evaluation/step-00000100.json")
    evaluate.set_defaults(run=_evaluate)

    layers = verbs.add_parser("layers", help="what each layer of a checkpoint does, and the loss without it")
    layers.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    _add_text(layers)
    layers.add_argument("--window", type=int, metavar="N", help="tokens of context (train.seq_len)")
    layers.add_argument("--tokens", type=int, default=1024, metavar="N", help="of whole windows (1024)")
    layers.add_argument("--every", type=int, default=1, metavar="K", help="skips every K-th layer only (1)")
    layers.add_argument(
        "--threshold", type=float, default=1e-3, metavar="X", help="a layer does nothing below this, in nats (0.001)"
    )
    layers.add_argument("--json", type=Path, metavar="FILE", help="instead of RUN/evaluation/step-…-layers.json")
    layers.set_defaults(run=_layers)

    verify = verbs.add_parser("verify", help="read all of a checkpoint and compare it with its checksums")
    verify.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step-00000100")
    verify.set_defaults(run=_verify)

    schemes = verbs.add_parser("schemes", help="list the normalization schemes, with their fields")
    schemes.set_defaults(run=_schemes)
    return parser


def _add_text(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--data", nargs="+", default=(), metavar="DATA", help="token shards, or text as of tokenize (data.validation)"
    )
    verb.add_argument("--text-field", default="text", metavar="NAME", help="of JSONL and parquet (text)")
    verb.add_argument("--tokenizer", metavar="FILE", help="of the run, where it is not beside the run's data")


def _comma_list(words: str) -> list[str]:
    return words.split(",")


# Each verb imports what it needs when it runs: `nlm --help` and a bad config answer at once.


def _train(options: argparse.Namespace) -> None:
    from nlm.build import load_config
    from nlm.stop import REQUEUE, Stopped
    from nlm.train import train

    faulthandler.enable(file=2)  # of a crash in native code one learns at least from where it was called
    config = load_config(options.config, options.overrides)
    keep_lines(Path(config.log.dir))
    try:
        train(config)
    except Stopped as stopped:
        sys.exit(_fail(REQUEUE, stopped))


def _launch(options: argparse.Namespace) -> None:
    from nlm.launch import launch

    sys.exit(launch(options.config, options.overrides, options.cluster, options.sweep, options.dry_run))


def _preflight(options: argparse.Namespace) -> None:
    from nlm.build import load_config
    from nlm.preflight import preflight

    preflight(load_config(options.config, options.overrides))


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


def _generate(options: argparse.Namespace) -> None:
    import json

    from nlm.checkpoint import load_checkpoint
    from nlm.data.lookup import find_tokenizer
    from nlm.data.prompts import read_prompts
    from nlm.data.tokenizer import load_tokenizer
    from nlm.decode.generate import generate
    from nlm.runtime import pick_device

    if options.prompts and options.file:
        raise ValueError("--file: expected prompts or a file of them, got both; leave one out")
    model, config = load_checkpoint(options.checkpoint)
    tokenizer = load_tokenizer(find_tokenizer(config.data, options.tokenizer))
    prompts = options.prompts or read_prompts(options.file)
    one = len(prompts) == 1 and options.n == 1 and not options.json
    streams = one and options.beams is None
    if streams:
        print(prompts[0], end="", flush=True)
    texts = generate(
        model.to(pick_device()),
        prompts,
        tokenizer,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        beams=options.beams,
        length_penalty=options.length_penalty,
        n=options.n,
        batch=options.batch,
        show=(lambda piece: print(piece, end="", flush=True)) if streams else None,
    )
    if streams:
        print()
        return
    for i, (prompt, found) in enumerate(zip(prompts, texts, strict=True)):
        for j, text in enumerate(found):
            if options.json:
                facts = {"prompt": i, "sample": j, "text": text.text, "tokens": text.tokens}
                print(json.dumps(facts | {"log_prob": text.log_prob, "ended": text.ended}, ensure_ascii=False))
            else:
                print(f"{prompt}{text.text}" if one else f"--- {i + 1}.{j + 1}\n{prompt}{text.text}")


def _export(options: argparse.Namespace) -> None:
    from nlm.export.verbs import export

    print(f"{options.out}: {export(options.checkpoint, options.out, options.format, options.tokenizer)}")


def _import(options: argparse.Namespace) -> None:
    from nlm.export.verbs import import_folder

    import_folder(options.folder, options.out, options.overrides)
    print(options.out)


def _translate(options: argparse.Namespace) -> None:
    from nlm.checkpoint import load_checkpoint
    from nlm.data.lookup import find_tokenizer
    from nlm.data.prompts import read_prompts
    from nlm.data.tokenizer import load_tokenizer
    from nlm.decode.search import Beams
    from nlm.decode.translate import Translator
    from nlm.runtime import pick_device

    if options.texts and options.file:
        raise ValueError("--file: expected texts or a file of them, got both; leave one out")
    model, config = load_checkpoint(options.checkpoint)
    coder = load_tokenizer(find_tokenizer(config.data, options.tokenizer))
    search = Beams(options.beams, options.length_penalty)
    translator = Translator(model.to(pick_device()), coder, config.source_len, search, options.batch)
    print("\n".join(translator.texts(options.texts or read_prompts(options.file), options.to)))


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


def _evaluate(options: argparse.Namespace) -> None:
    from nlm.evaluate.run import Asked, evaluate

    paths, overrides = _divided(options)
    names = "data text_field tokenizer window stride tokens tasks include_path limit rows"
    asked = Asked(**{name: getattr(options, name) for name in names.split()})
    evaluate(paths, asked, overrides, options.json, options.follow)


def _layers(options: argparse.Namespace) -> None:
    from nlm.evaluate.depth_report import layers, save, text

    names = "data text_field tokenizer window tokens every threshold"
    found = layers(options.checkpoint, **{name: getattr(options, name) for name in names.split()})
    print(text(found))
    for path in save(found, options.checkpoint, options.json):
        print(path)


def _divided(options: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """argparse gives all to the first of two lists -> checkpoints, and overrides."""
    words = [*options.checkpoints, *options.overrides]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    return [Path(word) for word in words if word not in overrides], overrides


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
