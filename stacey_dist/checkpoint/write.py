"""Writing a checkpoint, and deleting old ones after the new one is complete."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stacey_dist.checkpoint.gather import Tensors
from stacey_dist.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    digest,
    directory_name,
    find_checkpoints,
    sha256,
)
from stacey_dist.version import __version__


def save_checkpoint(directory: Path, step: int, tensors: Tensors, extra: dict[str, Any]) -> Path:
    """Save weights, buffers and optimizer state after `step` updates under `directory`; returns the checkpoint.

    One process calls it, with what `gather_tensors` gave it.

    Args:
        directory: holds all checkpoints of a run.
        step: number of updates done.
        tensors: parameters (a tied one once, under its first name), persistent buffers, optimizer state.
        extra: anything JSON can hold; comes back from `load_checkpoint`.

    Raises:
        OSError: the files could not be written; nothing is left behind, and older checkpoints are as they were.
    """
    final = directory / directory_name(step)
    temporary = directory / f".{final.name}.tmp-{os.getpid()}"
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(".step_*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_tensors(temporary / MODEL_FILE, tensors.model)
        _write_tensors(temporary / OPTIMIZER_FILE, tensors.optimizer)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "versions": {"stacey_dist": __version__, "torch": torch.__version__},
            "extra": extra,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
                for file in sorted(temporary.iterdir())
            },
        }
        manifest["sha256"] = digest(manifest)
        with (temporary / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def keep_newest(directory: Path, count: int, saved: Path) -> None:
    """Delete all but the newest `count` checkpoints under `directory`, counted from the one just `saved`.

    Directories of later steps, which resuming passed over, neither count nor go.
    """
    names = find_checkpoints(directory)
    for path in names[names.index(saved) + count :]:
        # Out of sight first: a deletion cut short must not leave something that looks like a checkpoint.
        hidden = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:  # a full disk, for one; it is no OSError
        raise OSError(f"{file}: {error}") from error
    _sync(file)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
