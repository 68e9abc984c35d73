"""The verb `nlm layers`: what the layers of a checkpoint do, as text, JSON and a picture."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nlm.config import Config, ConfigError
from nlm.evaluate.corpus import Corpus
from nlm.evaluate.layers import LEAST, Depth, depth
from nlm.evaluate.load import Loader, evaluation_config
from nlm.evaluate.masked import masked_rows
from nlm.evaluate.results import Result, write
from nlm.evaluate.text import reading
from nlm.evaluate.windows import Windows, joined, rows
from nlm.mesh import Mesh
from nlm.runtime import pick_device
from nlm.statistics.cells import envelope

LINES = 16


def layers(
    checkpoint: Path,
    data: Sequence[str] = (),
    *,
    text_field: str = "text",
    tokenizer: str | None = None,
    window: int | None = None,
    tokens: int = 1024,
    every: int = 1,
    threshold: float = 1e-3,
) -> Depth:
    """On the first whole windows of `data`, by default the run's own for validation, that have `tokens`, one at least.

    Errors: ConfigError for what does not fit, and for data without a document as long as a window.
    """
    config = evaluation_config(checkpoint)
    window = reading(config, window).window
    problems = [
        f"--{name}: expected at least {least}, got {value}"
        for name, value, least in (("tokens", tokens, LEAST), ("every", every, 1), ("window", window, LEAST))
        if value < least
    ]
    if threshold < 0:
        problems.append(f"--threshold: expected a change of the loss, 0 or more, got {threshold}")
    if not data and config.data.validation is None:
        problems.append("--data: the run has no data.validation to fall back on; name text")
    if problems:
        raise ConfigError(problems)
    corpus = Corpus(data or [str(config.data.validation)], config, tokenizer, text_field)
    batch = _batch(corpus, config, window, max(1, tokens // window))
    mesh = Mesh(config.parallel, pick_device())
    (model,) = Loader(mesh).load(checkpoint, config).models
    return depth(model, batch.to(mesh.device), every, threshold)


def _batch(corpus: Corpus, config: Config, window: int, n: int) -> Windows:
    """The first n whole windows; they begin inside documents."""
    documents = (document.tokens for document in corpus.documents())
    if config.model.is_encoder:
        found = masked_rows(documents, config, window)
    else:
        found = (row for tokens in documents for row in rows(tokens, window, window))
    whole = list(islice((row for row in found if len(row.tokens) == window + 1), n))
    if not whole:
        least = window if config.model.is_encoder else window + 1
        raise ConfigError([f"--window: no document has {least} tokens; choose a shorter one"])
    batch = joined(whole, len(whole), window)
    if not batch.n_targets():
        raise ConfigError([f"--tokens: none of the {len(whole) * window} is masked; give more"])
    return batch


def text(found: Depth) -> str:
    """Lines for the console, at most LINES of them for the layers."""
    names = ("layer", "lens after", "rank after", *(f"no {name}" for name in found.skipped))
    head = "".join(f"{name:>12}" for name in names)
    lines = [f"loss {found.loss:.4f} on {found.tokens:,} tokens", "", head]
    n = len(found.tested)
    for i in np.unique(np.linspace(0, n - 1, min(LINES, n)).round().astype(int)):
        l = found.tested[i]
        changes = (values[i] - found.loss for values in found.skipped.values())
        after = f"{found.lens[l + 1]:12.4f}{found.rank[l + 1]:12.2f}"
        lines.append(f"{l:12}{after}" + "".join(f"{change:+12.4f}" for change in changes))
    share = len(found.idle) / n
    lines += [
        "",
        f"{len(found.idle)} of {n} tested layers ({share:.0%}) change the loss by less than {found.threshold:g} each: "
        f"{_ranges(found.idle, found.tested) or 'none'}",
        f"without all of them at once the loss is {found.loss_without_idle:.4f}",
    ]
    return "\n".join(lines)


def save(found: Depth, checkpoint: Path, json_file: Path | None = None) -> Iterator[Path]:
    """Writes RUN/evaluation/step-…-layers.json or `json_file`, and a picture beside it; yields what it has written."""
    kept = Result(checkpoint).file
    file = json_file or kept.with_name(f"{kept.stem}-layers.json")
    arrays = {name: x.tolist() for name, x in asdict(found).items() if isinstance(x, np.ndarray)}
    skipped = {name: x.tolist() for name, x in found.skipped.items()}
    write(file, {"checkpoint": str(checkpoint)} | asdict(found) | arrays | {"skipped": skipped})
    yield file
    picture(found, f"{Result(checkpoint).run.name}, {Result(checkpoint).name}").savefig(
        path := file.with_suffix(".png")
    )
    yield path


def picture(found: Depth, title: str) -> Figure:
    """What skipping costs, what is read off after each layer, effective rank and similarity, over the layers."""
    figure = Figure(figsize=(11, 8), dpi=100, layout="constrained")
    figure.suptitle(title)
    skip, lens, rank, similarity = figure.subplots(2, 2).flat
    for name, values in found.skipped.items():
        x, y = envelope(values - found.loss)
        skip.plot(
            x * (found.tested[1] if len(found.tested) > 1 else 1), y, marker="." if len(y) < 64 else None, label=name
        )
    skip.set_yscale("symlog", linthresh=max(found.threshold, 1e-6))
    skip.axhspan(-found.threshold, found.threshold, color="black", alpha=0.12, linewidth=0)
    skip.legend(title="skipped")
    skip.set_title("change of the loss, nats a token")
    skip.set_xlabel("layer")
    for axes, values, name in (
        (lens, found.lens, "logit lens: loss, nats a token"),
        (rank, found.rank, "effective rank"),
    ):
        axes.plot(*envelope(values), marker="." if len(values) < 64 else None)
        axes.set_title(name)
        axes.set_xlabel("layers passed")
    n = len(found.lens)
    image = similarity.imshow(
        found.similarity, origin="lower", vmin=0, vmax=1, cmap="magma", extent=(-0.5, n - 0.5, -0.5, n - 0.5)
    )
    similarity.set_title("similarity of streams, linear CKA")
    similarity.set_xlabel("layers passed")
    figure.colorbar(image, ax=similarity)
    return figure


def _ranges(some: Sequence[int], of: Sequence[int] | np.ndarray) -> str:
    """3, 5-7: neighbours among all tested layers together."""
    places = {int(layer): i for i, layer in enumerate(of)}
    runs: list[list[int]] = []
    for layer in some:
        if runs and places[layer] == places[runs[-1][-1]] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
