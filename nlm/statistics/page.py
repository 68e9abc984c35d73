"""The page `report.html` of `nlm report`: what runs did, in one file that needs nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from nlm.config import Table
from nlm.statistics.cells import CURVES, chosen, described, scale_of
from nlm.statistics.draw import ABSENT, COLOURS, MAIN, NOT_FINITE, parts, quantities
from nlm.statistics.heat import ABSENT_CODE, FIRST_LEVEL, LEVELS, NOT_FINITE_CODE, Heat, heat, palette
from nlm.statistics.outliers import Outlier, outliers
from nlm.statistics.profile import HEIGHT, WIDTH, Profile, profile
from nlm.statistics.runs import Run
from nlm.statistics.store import STEP
from nlm.statistics.svg import INK, run_colour, svg
from nlm.timing import MEASURES, PERCENTILES, by_rank

TELLING = {"grad_norm": "layer", "stream_rms_out": "ffn", "update_ratio": "down"}
"""What is shown first, and of it the part, or the last where there is none of that name."""
LARGE, SMALL = (280, 320), (170, 320)
"""Cells of a heat map: of those that are shown first, and of the others. No more than a narrow screen has pixels there
(page.css), or the browser would leave some out."""
SIGMA = 4.0
"""From where on a layer is listed."""
LISTED = 12
"""Layers of a run."""
RANKS = 16
"""Of a run, in the table of times."""


@dataclass(frozen=True)
class HeatMap:
    """One heat map, as the template shows it."""

    title: str
    run: int  # whose steps it shows
    name: str  # of the run
    heat: Heat


@dataclass(frozen=True)
class Part:
    """A statistic of all runs: heat maps beside each other in one scale, and the curves over the layers."""

    name: str
    maps: list[HeatMap]
    profiles: list[Profile]


@dataclass(frozen=True)
class Listed:
    """A layer that stands out."""

    run: str
    statistic: str
    outlier: Outlier


def page(runs: Sequence[Run]) -> str:
    """HTML."""
    environment = Environment(
        loader=PackageLoader("nlm.statistics", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "scale": scale_words}
    shown = list(dict.fromkeys(quantity for run in runs for quantity in quantities(run.layers)))
    scales = {quantity: _scale(runs, quantity) for quantity in shown}
    script = {
        "palettes": {kind: palette(kind).tolist() for kind in COLOURS},
        "codes": {"absent": ABSENT_CODE, "notFinite": NOT_FINITE_CODE, "first": FIRST_LEVEL, "levels": LEVELS},
        "steps": [run.layers[STEP].tolist() if run.layers else [] for run in runs],
    }
    return environment.get_template("page.html.j2").render(
        runs=runs,
        cards=[_card(run) for run in runs],
        charts=_charts(runs),
        telling=[
            (described(quantity).title, _part(runs, quantity, part, scales[quantity], LARGE))
            for quantity in TELLING
            if (part := _telling_part(runs, quantity))
        ],
        all=[
            (described(q).title, q, [_part(runs, q, part, scales[q], SMALL) for part in _parts(runs, q)]) for q in shown
        ],
        profile_steps=[_profile_steps(run) for run in runs],
        listed=[listed for run in runs for listed in _worst(run)],
        sigma=SIGMA,
        faults=[(run.name, fault) for run in runs for fault in run.faults],
        alarms=[(run.name, alarm) for run in runs for alarm in run.alarms],
        ranks=[(run.name, *_slowest(run)) for run in runs if run.timing],
        timing=MEASURES,
        percentiles=PERCENTILES,
        environment=_side_by_side([run.environment for run in runs]),
        differences=[
            (key, values)
            for key, values in _side_by_side([run.config for run in runs])
            if len(set(values)) > 1 and key != "log.dir"
        ],
        gradients={kind: _gradient(name) for kind, name in COLOURS.items()},
        curves=CURVES,
        view_box=f"0 0 {WIDTH} {HEIGHT}",
        absent=ABSENT,
        not_finite=NOT_FINITE,
        script=Markup(json.dumps(script, separators=(",", ":"))),
    )


def number(value: Any) -> str:
    """For people: three significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 or isinstance(value, int) else f"{value:.2e}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 or not np.isfinite(value) else f"{value:.2e}"


def scale_words(heat: Heat) -> list[str]:
    """What stands at the low end, in the middle and at the high end of the colour bar."""
    middle = (heat.low * heat.high) ** 0.5 if heat.kind == "log" else (heat.low + heat.high) / 2
    return [f"{value:.2g}" for value in (heat.low, middle, heat.high)]


def _card(run: Run) -> dict[str, str]:
    """The numbers by which a run is judged."""
    steps, last = run.config["train"]["steps"], run.records[-1]["step"]
    _, speeds = run.series("tokens_s")
    left_out = sum("left_out" in fault for fault in run.faults)
    rollbacks = sum("to" in fault for fault in run.faults)
    card = {
        "step": f"{last:,} of {steps:,}",
        "loss": f"{run.records[-1]['loss']:.4f}",
        "validation loss": "–" if (loss := run.last("validation_loss")) is None else f"{loss:.4f}",
        "tokens/s, median": f"{median(speeds):,.0f}",
    }
    if (mfu := run.last("mfu")) is not None:
        card["MFU"] = f"{mfu:.1%}"
    elif (tflops := run.last("tflops_per_rank")) is not None:
        card["TFLOP/s a rank"] = number(tflops)
    card["peak memory of a rank"] = f"{max(run.series('peak_memory_gib')[1]):.2f} GiB"
    card["steps left out"] = f"{left_out}" + (f", went back {rollbacks} ×" if rollbacks else "")
    card["alarms"] = str(len(run.alarms))
    return card


def _charts(runs: Sequence[Run]) -> list[tuple[str, str, Markup]]:
    """Title, what it takes to read it, and the curves of all runs over each other."""
    notes = ["dots: validation"] if any(run.last("validation_loss") is not None for run in runs) else []
    notes += [f"dashed: unigram entropy, {entropy:.2f}" for entropy in _entropies(runs)]
    return [
        ("Loss, nats a token", ", ".join(notes), svg(partial(_losses, runs), "Loss over steps")),
        (
            "Norm of the gradient, before clipping",
            "",
            svg(partial(_over_steps, runs, "grad_norm", True), "Gradient norm"),
        ),
        ("Tokens a second", "", svg(partial(_over_steps, runs, "tokens_s", False), "Tokens a second over steps")),
        (
            "Peak memory of a rank, GiB",
            "",
            svg(partial(_over_steps, runs, "peak_memory_gib", False), "Memory over steps"),
        ),
    ]


def _losses(runs: Sequence[Run], axes: Axes) -> None:
    for i, run in enumerate(runs):
        axes.plot(*_finite(*run.series("loss")), color=run_colour(i))
        axes.plot(*_finite(*run.series("validation_loss")), "o", color=run_colour(i), markersize=5)
    for entropy in _entropies(runs):
        axes.axhline(entropy, color=INK, linestyle="--", linewidth=1)
    _step_axis(axes)


def _entropies(runs: Sequence[Run]) -> list[float]:
    """Of the unigrams of each corpus."""
    return sorted({run.unigram_entropy_nats for run in runs if run.unigram_entropy_nats})


def _over_steps(runs: Sequence[Run], key: str, log: bool, axes: Axes) -> None:
    for i, run in enumerate(runs):
        axes.plot(*_finite(*run.series(key)), color=run_colour(i))
    if log:
        scale = scale_of((np.array(run.series(key)[1]) for run in runs), "log")
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(scale.vmin, scale.vmax)
    else:
        axes.set_ylim(bottom=0)
    _step_axis(axes)


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _finite(steps: Sequence[int], values: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any]]:
    y = np.array(values, np.float64)
    return np.array(steps), np.where(np.isfinite(y), y, np.nan)


def _parts(runs: Sequence[Run], quantity: str) -> list[str]:
    return list(dict.fromkeys(part for run in runs for part in _names(run, quantity)))


def _names(run: Run, quantity: str) -> list[str]:
    return [name.partition("/")[2] for name in run.layers if name.startswith(f"{quantity}/")]


def _telling_part(runs: Sequence[Run], quantity: str) -> str | None:
    """None where no run has recorded the quantity."""
    names = _parts(runs, quantity)
    return TELLING[quantity] if TELLING[quantity] in names else next(reversed(names), None)


def _scale(runs: Sequence[Run], quantity: str) -> Normalize:
    """Of all parts in all runs."""
    arrays = (values for run in runs for values in parts(run.layers, quantity).values())
    return scale_of(arrays, described(quantity).scale)


def _part(runs: Sequence[Run], quantity: str, part: str, scale: Normalize, most: tuple[int, int]) -> Part:
    """A statistic of the runs that have it."""
    kind = described(quantity).scale
    maps, profiles = [], []
    for i, run in enumerate(runs):
        if f"{quantity}/{part}" in run.layers:
            values = run.layers[f"{quantity}/{part}"]
            label = f"{described(quantity).title}, {part}, {run.name}"
            maps.append(HeatMap(label, i, run.name, heat(values, scale, kind, most)))
            profiles.append(profile(values, scale))
    return Part(part, maps, profiles)


def _profile_steps(run: Run) -> list[int]:
    return [int(run.layers[STEP][i]) for i in chosen(len(run.layers[STEP]))] if run.layers else []


def _worst(run: Run) -> Iterator[Listed]:
    """The layers that are farthest off in the main quantities, the farthest first."""
    found = [
        Listed(run.name, f"{quantity}/{part}", outlier)
        for quantity in quantities(run.layers)
        if quantity in MAIN
        for part, values in parts(run.layers, quantity).items()
        for outlier in outliers(values, described(quantity).scale, SIGMA)
    ]
    yield from sorted(found, key=lambda listed: -listed.outlier.sigma)[:LISTED]


def _slowest(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The ranks with the most time of their own, that with the most first -> so many rows, and how many ranks are left
    out."""
    rows = sorted(by_rank(run.timing), key=lambda row: -row["own_s"][50])
    return rows[:RANKS], len(rows[RANKS:])


def _side_by_side(tables: Sequence[Table]) -> list[tuple[str, list[str]]]:
    """Each dotted key that any of the tables has, and what it is in each."""
    rows = [dict(_flat(table)) for table in tables]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [(key, [row.get(key, "–") for row in rows]) for key in keys]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "–" if value is None else str(value)


def _gradient(name: str) -> str:
    """A colour map as CSS has it."""
    return f"linear-gradient(to right, {', '.join(to_hex(colormaps[name](x)) for x in np.linspace(0, 1, 12))})"


def write_page(runs: Sequence[Run], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(runs), encoding="utf-8")
    return path
