"""Fragments as `torch.distributed.checkpoint` knows them: ranges of flattened tensors."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Range:
    """Elements [start, start + values.numel()) of a flattened tensor of `size` elements."""

    start: int
    values: Tensor
    size: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The range in torch's words."""
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.values.numel()]))


class RangeLoadPlanner(LoadPlanner):
    """Each rank reads what its own ranges need, from whatever ranges were written, into their tensors."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take the ranges, by name; there may be several of a tensor in one list."""
        self.ranges: Mapping[str, Range] = state_dict
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """The written ranges that overlap with one of ours."""
        assert self.metadata is not None
        items = []
        for name, part in self.ranges.items():
            written: Any = self.metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, written, [part.chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuse: there are tensors only, and bytes could be a pickle."""
        raise TypeError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of our range that an item fills."""
        values = self.ranges[read_item.dest_index.fqn].values
        return values.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor was filled in place."""


@contextmanager
def alone() -> Iterator[None]:
    """Around torch's functions with `no_dist`: each rank means to work by itself, and need not be warned of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
