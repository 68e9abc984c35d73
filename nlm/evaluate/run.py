"""The verb `nlm evaluate`: checkpoints, in one process or as ranks, on text and on tasks."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlm.checkpoint import checkpoint_config, checkpoints, saved_step
from nlm.config import Config, ConfigError
from nlm.data.lookup import find_tokenizer
from nlm.data.pairs import pairs_of
from nlm.data.tokenizer import load_tokenizer
from nlm.evaluate.corpus import Corpus
from nlm.evaluate.load import Loader, chosen, evaluation_config
from nlm.evaluate.results import Result, header, keep, line, picture, write
from nlm.evaluate.text import measure, reading
from nlm.mesh import Mesh
from nlm.parallel.launch import process_group
from nlm.runtime import keep_freed_memory, pick_device
from nlm.train import last_step

POLL_S = 5.0


@dataclass(frozen=True)
class Asked:
    """On what, and how. Without data and tasks, on the run's own data for validation."""

    data: Sequence[str] = ()
    text_field: str = "text"
    tokenizer: str | None = None
    window: int | None = None
    stride: int | None = None
    tokens: int | None = None
    tasks: Sequence[str] = ()
    include_path: str | None = None
    limit: int | None = None
    rows: int | None = None


def evaluate(
    paths: Sequence[Path],
    asked: Asked,
    overrides: Iterable[str] = (),
    json_file: Path | None = None,
    follow: bool = False,
) -> list[Result]:
    """Prints a line a checkpoint, keeps each result in RUN/evaluation/step-….json, or all of them in `json_file`, and
    draws them beside. With `follow`, of one run, also those that come until it ends.

    Errors: ValueError for what does not fit, before anything is allocated.
    """
    overrides = list(overrides)
    if follow and (len(paths) != 1 or not (paths[0] / "config.toml").exists() or "RANK" in os.environ):
        raise ConfigError(["--follow: expected the folder of one run, and one process"])
    first = paths[0] if follow else chosen(paths)[0]
    config = evaluation_config(first, overrides, asked.rows)
    device, results = pick_device(), list[Result]()
    with process_group(config, device) as step_ended:
        mesh = Mesh(config.parallel, device)
        loader = Loader(mesh)
        keep_freed_memory()
        for checkpoint in following(paths[0]) if follow else mesh.told(chosen(paths)):
            try:
                result = _one(checkpoint, asked, overrides, loader, step_ended)
            except ValueError:
                if follow and not checkpoint.exists():  # the run keeps the newest only
                    continue
                raise
            results.append(result)
            if mesh.speaks:
                _say(result, is_first=len(results) == 1)
                if json_file is None:
                    keep(result)
        if mesh.speaks:
            for file in _written(results, json_file):
                print(file)
    return results


def following(run: Path) -> Iterator[Path]:
    """A run's checkpoints, and those to come, up to its last step."""
    done, last = set[Path](), last_step(checkpoint_config(run))
    while not any(saved_step(checkpoint) >= last for checkpoint in done):
        new = [checkpoint for checkpoint in checkpoints(run) if checkpoint not in done]
        if not new:
            time.sleep(POLL_S)
        for checkpoint in new[:1]:
            done.add(checkpoint)
            yield checkpoint


def _one(checkpoint: Path, asked: Asked, overrides: list[str], loader: Loader, step_ended: Any) -> Result:
    config, result = evaluation_config(checkpoint, overrides, asked.rows), Result(checkpoint)
    if config.model.reads_source:
        return _translated(result, config, asked, loader)
    data = asked.data or ([] if asked.tasks else _validation(config))
    corpus = Corpus(data, config, asked.tokenizer, asked.text_field)
    how = reading(config, asked.window, asked.stride, asked.tokens, tasks=bool(asked.tasks))
    inference = loader.load(checkpoint, config)
    if data:
        result.text[" ".join(data)] = measure(inference, corpus, how, step_ended)
    if asked.tasks:
        from nlm.evaluate.harness import Harness, run_tasks  # an optional extra, imported only when chosen

        if corpus.coder is None:
            raise ConfigError(["--tokenizer: that of the run is not beside its data; name it, for tasks are text"])
        harness = Harness(inference=inference, coder=corpus.coder, window=how.window, after_each=step_ended)
        result.tasks = run_tasks(harness, asked.tasks, asked.include_path, asked.limit)
    return result


def _translated(result: Result, config: Config, asked: Asked, loader: Loader) -> Result:
    from nlm.decode.translate import BEAMS, Translator, scores  # scored by an optional extra
    from nlm.evaluate.translation import table

    if loader.mesh.device_mesh is not None:
        raise ConfigError(["model.architecture: an encoder_decoder translates in one process, not in several ranks"])
    if asked.tasks or any((asked.window, asked.stride, asked.tokens)):
        raise ConfigError(["--tasks, --window, --stride, --tokens: are not of an encoder_decoder, which translates"])
    coder = load_tokenizer(find_tokenizer(config.data, asked.tokenizer))
    (model,) = loader.load(result.checkpoint, config).models
    translator = Translator(model.eval(), coder, config.source_len, BEAMS)
    for path in asked.data or _validation(config):
        found = scores(translator, pairs_of(config, path), asked.limit)
        result.translation[path] = {direction: asdict(score) for direction, score in found.items()}
        print(f"{result.name}, {path}\n{table(found)}", flush=True)
    return result


def _validation(config: Config) -> list[str]:
    if config.data.validation is None:
        raise ConfigError(["--data: the run has no data.validation to fall back on; name text, or --tasks"])
    return [config.data.validation]


def _say(result: Result, is_first: bool) -> None:
    """But for translations, which have a table of their own."""
    for data, found in result.text.items():
        if is_first:
            print(header(Path(data).name[:15]))
        print(line(result.name, found), flush=True)
    for task, metrics in result.tasks.items():
        for metric, value in metrics.items():
            print(f"{result.name:16}{task:>28} {metric:>24} {value:12.4f}", flush=True)


def _written(results: Sequence[Result], json_file: Path | None) -> Iterator[Path]:
    """What is written at the end, and where the rest is."""
    if json_file is not None:
        write(json_file, [result.to_json() for result in results])
        yield json_file
    else:
        yield from (result.file for result in results)
    for i, data in enumerate(dict.fromkeys(data for result in results for data in result.text)):
        folder, name = results[0].file.parent, f"{Path(data).name}.png"
        file = folder / name if json_file is None else json_file.with_suffix(f".{i}.png" if i else ".png")
        picture(results, data).savefig(file)
        yield file
