"""Writing a checkpoint: every rank its own ranges, the manifest last, one rename."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stacey_dist.checkpoint.manifest import FORMAT, MANIFEST, digest
from stacey_dist.checkpoint.replicas import compare_once
from stacey_dist.checkpoint.schema import check_manifest
from stacey_dist.checkpoint.shard import Range, all_finite, shard_name, write_shard
from stacey_dist.checkpoint.snapshot import Contents, take
from stacey_dist.checkpoint.together import gathered, on_first, rank, world_size
from stacey_dist.errors import SettingsError
from stacey_dist.files import parse_json
from stacey_dist.version import __version__

_VISIBLE_SECONDS = 60.0


def save_checkpoint(path: Path, model: nn.Module, optimizer: Any, extra: dict[str, Any] | None = None) -> Path:
    """Save weights, buffers and optimizer state as the directory `path`, from any engine; returns `path`.

    All ranks call it together, with a path that all of them reach. Each writes what it holds; none gathers anything
    but frozen parameters, one after another.
    The directory appears under its name when every file in it is complete and on the disk; one that is there already
    is replaced. That takes two renames, and a kill between them leaves neither under the name until the next save there
    brings the old one back: a name for each save is safer.
    The manifest's entry `finite` says whether all trainable weights and optimizer states are finite. Buffers and frozen
    parameters do not count.

    Args:
        path: the checkpoint's directory.
        model: the model, or what its engine has made of it; parameters (a tied one once, under its first name) and
            persistent buffers are saved.
        optimizer: its optimizer, or what the engine has made of it.
        extra: anything JSON can hold; comes back from `load_checkpoint`.

    Raises:
        NotImplementedError: the model is split over the ranks in a way that is not supported; the message names it.
        SettingsError: ranks that count as replicas differ, which is looked at in a model's first save.
        OSError: the files could not be written, on this rank or another. Nothing is left behind, and other
            checkpoints are as they were.
    """
    compare_once(model, optimizer)
    ranges, contents = take(model, optimizer)
    write(path, ranges, contents, extra or {})
    return path


def write(path: Path, ranges: dict[str, Range], contents: Contents, extra: dict[str, Any], group: Any = None) -> None:
    """Write what `take` gave on each rank; the ranks talk over `group`. See `save_checkpoint`."""
    temporary = path.with_name(f".{path.name}.tmp")
    replaced = path.with_name(f".{path.name}.tmp-replaced")

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _bring_back(replaced, path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def write_mine() -> tuple[dict[str, Any], Contents, dict[str, list[tuple[int, int]]], list[bool]]:
        _wait_for(temporary)
        name = shard_name(rank())
        files = {name: write_shard(temporary / name, ranges)} if ranges else {}
        spans = {key: [(part.start, part.stop)] for key, part in ranges.items()}
        finite = [all_finite(part.values) for part in ranges.values() if part.trained]
        return files, contents, spans, finite

    def finish() -> None:
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        spans: dict[str, list[tuple[int, int]]] = {}
        finite: list[bool] = []
        for rank_files, rank_contents, rank_spans, rank_finite in written:
            finite += rank_finite
            files.update(rank_files)
            tensors.update({name: list(kind) for name, kind in rank_contents.items()})
            for name, found in rank_spans.items():
                spans.setdefault(name, []).extend(found)
        _check_complete(tensors, spans)
        for file in files:
            _wait_for(temporary / file)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "versions": {"stacey_dist": __version__, "torch": torch.__version__},
            "processes": world_size(),
            "tensors": dict(sorted(tensors.items())),
            "extra": extra,
            "files": dict(sorted(files.items())),
        }
        if finite:  # else it is not known: nobody has said which tensors are trained
            manifest["finite"] = all(finite)
        try:
            as_read = parse_json(json.dumps(manifest))
            check_manifest(as_read)
        except ValueError as error:
            raise SettingsError(f"{path}: it can't be saved, as it could not be read: {error}") from error
        manifest["sha256"] = digest(as_read)
        with (temporary / MANIFEST).open("w") as opened:
            json.dump(manifest, opened, indent=1)
            opened.flush()
            os.fsync(opened.fileno())
        _sync(temporary)
        if path.exists():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            _bring_back(replaced, path)
            raise
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    try:
        on_first(begin, group)
        written = gathered(write_mine, group)
        on_first(finish, group)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_leftovers(directory: Path) -> None:
    """Remove what saves that were killed have left in a directory that nobody saves into now."""
    for replaced in directory.glob(".step_*.tmp-replaced"):
        _bring_back(replaced, directory / replaced.name.removeprefix(".").removesuffix(".tmp-replaced"))
    for stale in directory.glob(".step_*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def _bring_back(replaced: Path, path: Path) -> None:
    """Undo a replacement that was not completed; remove what a completed one has left."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _wait_for(path: Path) -> None:
    """Wait until what another rank has made is there: a shared file system may show it late. Raises OSError."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(f"{path} is not there for rank {rank()}; all ranks must write to one directory")
        time.sleep(0.05)


def _check_complete(tensors: dict[str, Any], spans: dict[str, list[tuple[int, int]]]) -> None:
    """Every element of every tensor was written, once: a defence against an engine that is not what it seems."""
    for name, (shape, _) in tensors.items():
        position = 0
        for start, stop in sorted(spans.get(name, [])):
            if start != position:
                raise RuntimeError(f"{name}: elements {position} to {start} were written by no rank, or by two")
            position = stop
        if position != torch.Size(shape).numel():
            raise RuntimeError(f"{name}: only {position} of {torch.Size(shape).numel()} elements were written")


def _sync(path: Path) -> None:
    """Wait until a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
