"""Heat maps inside a page: an image whose colours are levels, so that a script reads the values back from it."""

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.colors import Normalize, to_rgb
from numpy.typing import NDArray
from PIL import Image

from nlm.statistics.cells import ScaleKind, cells
from nlm.statistics.draw import ABSENT, NOT_FINITE, colour_map

ABSENT_CODE, NOT_FINITE_CODE, FIRST_LEVEL = 0, 1, 2
LEVELS = 256 - FIRST_LEVEL


@dataclass(frozen=True)
class Heat:
    """A PNG as data URI, layers upwards and steps to the right, `rows` by `columns`, and what its colours mean."""

    uri: str
    rows: int
    columns: int
    n_layers: int
    kind: ScaleKind
    low: float
    high: float


def heat(values: NDArray[Any], scale: Normalize, kind: ScaleKind, most: tuple[int, int]) -> Heat:
    """values [steps L] -> at most so many rows (layers) and columns (steps)."""
    drawn = cells(values, scale, most)
    finite = np.isfinite(drawn.levels)
    codes = np.full(drawn.levels.shape, NOT_FINITE_CODE, np.uint8)
    codes[finite] = FIRST_LEVEL + np.round(drawn.levels[finite] * (LEVELS - 1)).astype(np.uint8)
    codes[drawn.absent] = ABSENT_CODE
    rows, columns = len(drawn.rows) - 1, len(drawn.columns) - 1
    image = Image.frombytes("P", (columns, rows), codes[::-1].tobytes())
    image.putpalette(palette(kind).tobytes())
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert scale.vmin is not None and scale.vmax is not None
    return Heat(uri, rows, columns, values.shape[1], kind, float(scale.vmin), float(scale.vmax))


def palette(kind: ScaleKind) -> NDArray[np.uint8]:
    """[256 3]: the colour of each code, no two the same."""
    levels = colour_map(kind)(np.linspace(0, 1, LEVELS))[:, :3]
    colours = np.concatenate([[to_rgb(ABSENT), to_rgb(NOT_FINITE)], levels])
    bytes_ = np.round(colours * 255).astype(np.uint8)
    assert len(np.unique(bytes_, axis=0)) == 256, "a colour would stand for two values"
    return bytes_
