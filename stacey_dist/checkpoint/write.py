"""Writing a checkpoint, and deleting old ones after the new one is complete."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

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


def save_checkpoint(directory: Path, step: int, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> Path:
    """Save weights, buffers and optimizer state after `step` updates under `directory`; returns the checkpoint.

    Args:
        directory: holds all checkpoints of a run.
        step: number of updates done.
        model: its parameters and persistent buffers are saved, a tied parameter once.
        optimizer: the state of each of the model's parameters is saved.
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
        _write_tensors(temporary / MODEL_FILE, model_tensors(model))
        tensors, scalars = optimizer_tensors(model, optimizer)
        _write_tensors(temporary / OPTIMIZER_FILE, tensors)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "versions": {"stacey_dist": __version__, "torch": torch.__version__},
            "optimizer": {"class": type(optimizer).__name__, "scalars": scalars},
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


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (a tied one once, under its first name) and persistent buffers, by name."""
    tensors: dict[str, Tensor] = {name: param.detach() for name, param in model.named_parameters()}
    persistent = model.state_dict().keys()
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in persistent})
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Each parameter's state as NAME/KEY: the tensors, and the plain numbers that some optimizers keep."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is not None:
                scalars[f"{name}/{key}"] = value
    return tensors, scalars


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
