"""AdamW of many tensors in one pass over memory, in Triton, and in the same pass the projection of those matrices whose
slices are to have norm 1 (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

A program updates some numbers of a tensor, or some whole slices of a matrix, part by part: what it has written of these
it reads again, from the cache, once it knows their norms.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""That a program has of a tensor at a time: 8 a thread."""
LONGEST = {0: 64, 1: 1024}
"""By axis, how much of a slice it has at a time at most: of a column little, so that many of them lie side by side."""
ALIGNMENT = 16
"""A thread reads several numbers at once where tensors begin at multiples of so many bytes, and rows of as many
numbers."""


def reference(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rate: float,
    decay: float,
    t: Tensor,
    betas: tuple[float, float],
    eps: float,
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, gradient and moments […], the `t`-th update [] from 1 -> the next weight and moments; along `axis` every
    slice has norm 1 then."""
    m, v = m.lerp(g, 1 - betas[0]), v.lerp(g * g, 1 - betas[1])
    root = (v / (1 - betas[1] ** t)).sqrt() + eps
    w = w - rate * (m / (1 - betas[0] ** t) / root + decay * w)
    return w if axis is None else w / w.norm(dim=axis, keepdim=True), m, v


@dataclass(frozen=True)
class Launch:
    """Of tensors that one launch can update. `tiles` [T 2] int32: of which tensor each is, and its number there; `rows`
    and `columns` are a tile's. Slices along `axis` become `unit`, or there are none."""

    tiles: Tensor
    rows: int
    columns: int
    axis: int
    unit: bool
    aligned: bool


@dataclass(frozen=True)
class Table:
    """What is updated together. `addresses` [N 3] int64 are of weights and moments, which must outlive it; `shapes`
    [N 2] int64 are rows and columns."""

    addresses: Tensor
    shapes: Tensor
    launches: tuple[Launch, ...]


def table(weights: Sequence[Tensor], ms: Sequence[Tensor], vs: Sequence[Tensor], axes: Sequence[int | None]) -> Table:
    """Of one dtype and device, each in one piece of memory; matrices that have an axis get slices of norm 1."""
    device = weights[0].device
    addresses = [[tensor.data_ptr() for tensor in of] for of in zip(weights, ms, vs, strict=True)]
    shapes, kinds = [], defaultdict[tuple[int, int, int, bool, bool], list[tuple[int, int]]](list)
    for i, (w, axis) in enumerate(zip(weights, axes, strict=True)):
        assert w.is_contiguous() and ms[i].is_contiguous() and vs[i].is_contiguous()
        shape = (1, w.numel()) if axis is None else tuple(w.shape)
        shapes.append(shape)
        if w.numel():
            tile, across = tile_of(shape, axis or 0), 1 - (axis or 0)
            aligned = shape[1] % ALIGNMENT == 0 and all(address % ALIGNMENT == 0 for address in addresses[i])
            kind = (*tile, axis or 0, axis is not None, aligned)
            kinds[kind].append((i, triton.cdiv(shape[across], tile[across])))
    return Table(
        torch.tensor(addresses, device=device),
        torch.tensor(shapes, device=device),
        tuple(Launch(_tiles(of).to(device), *kind) for kind, of in kinds.items()),
    )


def tile_of(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """Rows and columns that a program has at a time of slices along the axis."""
    along = min(LONGEST[axis], triton.next_power_of_2(shape[axis]))
    return (along, ELEMENTS // along) if axis == 0 else (ELEMENTS // along, along)


def _tiles(of: Sequence[tuple[int, int]]) -> Tensor:
    """Tensors, and how many tiles each has -> [T 2] int32."""
    tensors, counts = torch.tensor(of, dtype=torch.int32).unbind(1)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([tensors.repeat_interleave(counts), torch.arange(len(first)) - first], 1).int()


def update(
    tensors: Table,
    gradients: Sequence[Tensor],
    rates: Tensor,
    decays: Tensor,
    t: Tensor,
    betas: tuple[float, float],
    eps: float,
    left_out: Tensor,
) -> None:
    """In place, as `reference` of each, of nothing where `left_out` [] bool is true; rates and decays [N] and `t` [] in
    float64."""
    gradients = [g if g.is_contiguous() else g.contiguous() for g in gradients]
    dtype, device = gradients[0].dtype, t.device
    addresses = [g.data_ptr() for g in gradients]
    aligned = all(address % ALIGNMENT == 0 for address in addresses)
    places = torch.tensor(addresses, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    # The corrections of both means go into rate and eps.
    root = (1 - betas[1] ** t).sqrt()
    each = rates * root / (1 - betas[0] ** t), rates * decays, (eps * root).expand_as(rates)
    numbers = torch.stack(each, 1).to(dtype)
    for launch in tensors.launches:
        _update[(len(launch.tiles),)](
            tensors.addresses, places, tensors.shapes, numbers, launch.tiles, left_out, *betas,
            launch.rows, launch.columns, launch.axis, launch.unit, launch.aligned and aligned, num_warps=8,
        )  # fmt: skip


@triton.jit
def _at(addresses, i, like, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + i).to(tl.pointer_type(like.dtype.element_ty))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _places(tile, done, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """Of the tile's slices, after the `done` first numbers of each -> where they lie, and whether there are such."""
    tile = tl.cast(tile, tl.int64)
    row = (done if AXIS == 0 else tile * ROWS) + tl.arange(0, ROWS)[:, None]
    column = (done if AXIS == 1 else tile * COLUMNS) + tl.arange(0, COLUMNS)[None, :]
    return row * n_columns + column, (row < n_rows) & (column < n_columns)


@triton.jit
def _update(
    addresses, gradients, shapes, numbers, tiles, left_out, BETA_1: tl.constexpr, BETA_2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tensor, tile = tl.load(tiles + 2 * tl.program_id(0)), tl.load(tiles + 2 * tl.program_id(0) + 1)
    w_at, g_at = _at(addresses, 3 * tensor, numbers, ALIGNED), _at(gradients, tensor, numbers, ALIGNED)
    m_at, v_at = _at(addresses, 3 * tensor + 1, numbers, ALIGNED), _at(addresses, 3 * tensor + 2, numbers, ALIGNED)
    n_rows, n_columns = tl.load(shapes + 2 * tensor), tl.load(shapes + 2 * tensor + 1)
    if ALIGNED:
        n_columns = tl.multiple_of(n_columns, 16)
    numbers += 3 * tensor
    rate, decay, eps = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    length = tl.where(tl.load(left_out), 0, n_rows if AXIS == 0 else n_columns)
    squares = tl.zeros([ROWS, COLUMNS], numbers.dtype.element_ty)
    for done in range(0, length, ROWS if AXIS == 0 else COLUMNS):
        at, inside = _places(tile, done, n_rows, n_columns, ROWS, COLUMNS, AXIS)
        w, g = tl.load(w_at + at, inside, 0.0), tl.load(g_at + at, inside, 0.0)
        m, v = tl.load(m_at + at, inside, 0.0), tl.load(v_at + at, inside, 0.0)
        m = BETA_1 * m + (1 - BETA_1) * g
        v = BETA_2 * v + (1 - BETA_2) * g * g
        w -= decay * w + rate * m / (tl.sqrt(v) + eps)
        tl.store(m_at + at, m, inside)
        tl.store(v_at + at, v, inside)
        tl.store(w_at + at, w, inside)
        squares += tl.where(inside, w * w, 0.0)
    if UNIT:
        norms = tl.sqrt(tl.sum(squares, AXIS, keep_dims=True))
        tl.debug_barrier()  # a thread may read what another has written
        for done in range(0, length, ROWS if AXIS == 0 else COLUMNS):
            at, inside = _places(tile, done, n_rows, n_columns, ROWS, COLUMNS, AXIS)
            tl.store(w_at + at, tl.load(w_at + at, inside, 0.0) / norms, inside)
