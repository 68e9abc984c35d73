"""Curves as SVG inside a page: text stays text, colours are the page's own, light or dark."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID = "#0000f0", "#0000f1"
RUNS = 8
VARIABLES = {INK: "--ink-2", GRID: "--rule"}
VARIABLES |= {f"#0000a{i}": f"--run-{i}" for i in range(RUNS)}
"""Stand-ins that matplotlib draws in, and the variables of the style sheet that they become."""


def run_colour(i: int) -> str:
    return f"#0000a{i % RUNS}"


def svg(draw: Callable[[Axes], None], label: str, size: tuple[float, float] = (5.6, 3.2)) -> Markup:
    """What `draw` draws on axes of so many inches (of 72 units); `label` is for those who cannot see it."""
    with _style(label):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y")
        draw(axes)
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{Markup.escape(label)}"', text, count=1)
    text = re.sub(r"(\d+\.\d)\d+", r"\1", text)  # a tenth of a unit is a tenth of a pixel
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text)


@contextmanager
def _style(label: str) -> Iterator[None]:
    """`label` also keeps the identifiers inside one SVG apart from those of another."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.size": 10,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.4,
        "path.simplify_threshold": 0.3,
    }
    with mpl.rc_context(style):
        yield
