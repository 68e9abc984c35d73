"""Tensors that ranks hold in rectangles, as safetensors files, by way of torch.distributed.checkpoint.

Every rank writes the rectangles that it stands for, each under NAME@OFFSETS; whoever reads asks for any others of the
same tensors, whatever the layout. Reading executes no code: a file is JSON and numbers.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

# A run of one process has no process group, which is as it should be.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

FILE_BYTES = 2**31
"""About the size of a file: what is held in memory once more while it is written."""


@dataclass(frozen=True)
class Rectangle:
    """A part of the tensor `name` of `shape`: the one that begins at `offsets` and is as large as `tensor`."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def key(self) -> str:
        return key(self.name, self.offsets)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)


def key(name: str, offsets: Sequence[int]) -> str:
    return f"{name}@{','.join(map(str, offsets))}"


def write(folder: Path, rectangles: Sequence[Rectangle], group: dist.ProcessGroup | None) -> None:
    """Writes and flushes to the disk what the ranks of `group` (None: this process alone) have in CPU memory.

    Errors: as of the file system, on all ranks; ValueError when the rectangles do not make whole tensors.
    """
    writer, planner = _Writer(str(folder), save_distributed=True), _Save(rectangles)
    with _own_errors():
        save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)


def read(folder: Path, rectangles: Sequence[Rectangle]) -> None:
    """Fills the tensors of the rectangles, and reads no more than that.

    Errors: ValueError for a file that is damaged, and for tensors that are not there as a whole.
    """
    reader = _Reader(str(folder))
    with _own_errors():
        load({}, storage_reader=reader, planner=_Load(rectangles), no_dist=True)


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor as a whole. Errors: as of `read`."""
    saved = _Reader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in saved.items()}  # type: ignore[union-attr]
    read(folder, [Rectangle(name, t.shape, (0,) * t.dim(), t) for name, t in tensors.items()])
    return tensors


def whole(chunks: Mapping[str, TensorStorageMetadata]) -> None:
    """Errors: ValueError naming a tensor whose chunks do not cover it, or overlap."""
    for name, tensor in chunks.items():
        have, need = sum(prod(chunk.sizes) for chunk in tensor.chunks), prod(tensor.size)
        if have != need:
            raise ValueError(f"{name}: expected {need} elements in all files together, got {have}")


@contextmanager
def _own_errors() -> Iterator[None]:
    """What went wrong itself, of the lowest rank on which it did, instead of the exception that carries all."""
    try:
        yield
    except CheckpointException as carried:
        error, _ = min(carried.failures.items())[1]
        raise error from None


class _Save(DefaultSavePlanner):
    def __init__(self, rectangles: Sequence[Rectangle]) -> None:
        super().__init__()
        self._rectangles = {rectangle.key: rectangle for rectangle in rectangles}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(rectangle) for rectangle in self._rectangles.values()])

    def _item(self, rectangle: Rectangle) -> WriteItem:
        properties = TensorProperties(dtype=rectangle.tensor.dtype)
        data = TensorWriteData(rectangle.chunk, properties, torch.Size(rectangle.shape))
        index = MetadataIndex(rectangle.key, torch.Size(rectangle.offsets))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors: dict[str, TensorStorageMetadata] = {}
        for item in (item for plan in all_plans for item in plan.items):
            assert item.tensor_data is not None
            name, data = item.index.fqn.rpartition("@")[0], item.tensor_data
            tensors.setdefault(name, TensorStorageMetadata(data.properties, data.size, [])).chunks.append(data.chunk)
        whole(tensors)
        return all_plans, Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._rectangles[write_item.index.fqn].tensor


class _Writer(HuggingFaceStorageWriter):
    """A rank's rectangles, in files of about FILE_BYTES."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            replace(plan, storage_data={"shard_index": i, "fqn_to_index_mapping": self._files(plan)})
            for i, plan in enumerate(plans, start=1)
        ]

    def _files(self, plan: SavePlan) -> dict[str, int]:
        """The number of the file that each rectangle goes into, from 1."""
        files, size = {}, 0
        for item in plan.items:
            files[item.index.fqn] = 1 + size // FILE_BYTES
            assert item.tensor_data is not None
            size += prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        return files


class _Reader(HuggingFaceStorageReader):
    """Its tensors are the wholes, not the rectangles that they are stored in.

    Errors: OSError and SafetensorError for files that are missing or damaged, at once: `load` would hide them.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._metadata = self._whole_tensors()

    def read_metadata(self) -> Metadata:
        return self._metadata

    def _whole_tensors(self) -> Metadata:
        metadata = super().read_metadata()
        tensors: dict[str, TensorStorageMetadata] = {}
        for stored, part in metadata.state_dict_metadata.items():
            assert isinstance(part, TensorStorageMetadata)
            name = stored.rpartition("@")[0]
            tensor = tensors.setdefault(name, TensorStorageMetadata(part.properties, part.size, []))
            tensor.chunks += part.chunks
            tensor.size = torch.Size(map(max, tensor.size, part.size))
        stored_in = {
            MetadataIndex(index.fqn.rpartition("@")[0], index.offset): info
            for index, info in metadata.storage_data.items()
        }
        return Metadata(dict(tensors), storage_data=stored_in, storage_meta=metadata.storage_meta)

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        offsets = req.storage_index.offset
        assert offsets is not None
        slices = tuple(slice(start, start + n) for start, n in zip(req.storage_offsets, req.lengths, strict=True))
        planner.resolve_tensor(req).copy_(f.get_slice(key(req.storage_index.fqn, offsets))[slices])


class _Load(LoadPlanner):
    def __init__(self, rectangles: Sequence[Rectangle]) -> None:
        self._rectangles = {(rectangle.name, rectangle.offsets): rectangle for rectangle in rectangles}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._saved = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for rectangle in self._rectangles.values():
            saved = self._saved.get(rectangle.name)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != torch.Size(rectangle.shape):
                came = "no such tensor" if saved is None else f"{tuple(saved.size)}"  # type: ignore[union-attr]
                raise ValueError(f"{rectangle.name}: expected a tensor of shape {rectangle.shape}, got {came}")
            whole({rectangle.name: saved})
            items += create_read_items_for_chunk_list(rectangle.name, saved, [rectangle.chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("there are only tensors")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offsets = read_item.dest_index.offset
        assert offsets is not None
        part = self._rectangles[read_item.dest_index.fqn, tuple(offsets)].tensor
        for dim, (start, n) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, n)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It shares the rectangle's memory."""
