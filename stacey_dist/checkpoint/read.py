"""Load a checkpoint into a model and its optimizer, on any engine and any number of ranks."""

import errno
import functools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stacey_dist.checkpoint.collectives import rank, rank0_call, together, world_size
from stacey_dist.checkpoint.manifest import read_manifest, verify_files, verify_listing
from stacey_dist.checkpoint.model_tensors import Contents, Kind, frozen_parameters, persistent_buffers, write_whole
from stacey_dist.checkpoint.restore import allocate, check_fit, restore
from stacey_dist.checkpoint.shard import Range, read_shards
from stacey_dist.sharding import fragments, refresh_weights

# Whole tensors are read this much at a time.
_BATCH_BYTES = 1 << 30


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Load weights, buffers and optimizer state in place, bit for bit; return the manifest.

    ZeRO counts updates once for all parameters in a flat tensor. Where these had different counts, all continue with
    the largest, and a warning names two of them.

    All ranks call it together, on any engine and in any number; each reads the ranges that it holds now. The
    optimizer's settings (lr, ...) stay as they are: a checkpoint carries state, the program settings.

    Args:
        path: the checkpoint's directory, which all ranks can read.
        model: the model, or what its engine has made of it; names, shapes and dtypes must be the checkpoint's.
        optimizer: gets the state of the model's parameters, replacing what it has.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or altered; or a tensor does not fit the model. The
            model and the optimizer are not touched then, on any rank.
        OSError: a file could not be read, on this rank or another, after its checksum was compared.
    """
    path = Path(path)
    manifest = verify_together(path)
    load_verified(path, manifest, model, optimizer)
    return manifest


def load_verified(path: Path, manifest: dict[str, Any], model: nn.Module, optimizer: Any) -> None:
    """Load the checkpoint whose manifest `verify_together` has returned; see `load_checkpoint`."""
    contents = tensors(manifest)
    together(lambda: check_fit(path, contents, model, optimizer))  # a rank sees the dtypes of its own shards only
    replicas = max((f.replicas for f in fragments(model, optimizer, empty=True)), default=1)
    allocated = together(lambda: allocate(contents, model, optimizer))
    together(lambda: _read(path, manifest, allocated.ranges, replicas))
    restore(allocated, optimizer)
    whole = [f"model/{name}" for name, _ in (*frozen_parameters(model), *persistent_buffers(model))]
    for batch in batches({name: contents[name] for name in whole}):
        values = together(functools.partial(_read_whole, path, manifest, batch))
        write_whole(model, {name.removeprefix("model/"): value for name, value in values.items()})
    refresh_weights(model, optimizer)


def read_tensors(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with these names (None: all), as wholes in host memory, by name.

    Raises DamagedCheckpointError, OSError.
    """
    path = Path(path)
    manifest = read_manifest(path)
    kinds = tensors(manifest)
    return _read_whole(path, manifest, kinds if names is None else {name: kinds[name] for name in names})


def tensors(manifest: dict[str, Any]) -> Contents:
    """Return the shape and dtype of each tensor in a checkpoint, by name."""
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in manifest["tensors"].items()}


def batches(contents: Contents) -> Iterator[Contents]:
    """Yield the tensors some at a time, so that a batch has about `_BATCH_BYTES`."""
    batch: dict[str, Kind] = {}
    size = 0
    for name, (shape, dtype) in contents.items():
        batch[name] = shape, dtype
        size += math.prod(shape) * getattr(torch, dtype).itemsize
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def verify_together(path: Path) -> dict[str, Any]:
    """Verify a checkpoint as `verify` does, by all ranks together: each compares the checksums of some of the files.

    Raises DamagedCheckpointError on all ranks.
    """
    manifest = rank0_call(lambda: read_manifest(path))
    rank0_call(lambda: verify_listing(path, manifest))
    mine = list(manifest["files"])[rank() :: world_size()]
    together(lambda: verify_files(path, manifest, mine))
    return manifest


def _read_whole(path: Path, manifest: dict[str, Any], contents: Contents) -> dict[str, Tensor]:
    """Return whole tensors of the checkpoint in host memory, by name."""
    try:
        whole = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            for name, (shape, dtype) in contents.items()
        }
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"{path}: there is no memory for its tensors: {error}") from error
    _read(path, manifest, {name: Range(0, tensor.view(-1)) for name, tensor in whole.items()})
    return whole


def _read(path: Path, manifest: dict[str, Any], ranges: dict[str, Range], replicas: int = 1) -> None:
    """Fill ranges from the checkpoint's files. Open first the files that most likely contain them.

    If the number of ranks is unchanged, a rank's own file and those of its replicas contain everything that it needs,
    except step counts. A step count is in the file of the rank that wrote the first element of the parameter: the
    preceding rank or, if each parameter is split over all ranks, the first rank.
    """
    files = sorted(manifest["files"])
    own = rank() * len(files) // world_size()
    same = {(own + len(files) * replica // replicas) % max(1, len(files)) for replica in range(replicas)}
    nearest = sorted(range(len(files)), key=lambda i: (i != own, i not in same, i != 0, abs(i - own)))
    read_shards(path, [files[i] for i in nearest], ranges)
