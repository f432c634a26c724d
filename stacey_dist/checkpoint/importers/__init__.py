"""Import checkpoints that Accelerate or DeepSpeed saved in runs that used Stacey.

Most of these files are pickles. They are read with an allowlist of harmless classes, so that no code in them runs.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stacey_dist.checkpoint.importers import accelerate, deepspeed
from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError, Imported, check_size, renamed
from stacey_dist.checkpoint.manifest import as_read
from stacey_dist.checkpoint.schema import is_count
from stacey_dist.checkpoint.shard import DTYPES
from stacey_dist.checkpoint.snapshot import Snapshot
from stacey_dist.checkpoint.write import write
from stacey_dist.errors import one_line
from stacey_dist.files import with_name
from stacey_dist.sharding.fragment import canonical_name

T = TypeVar("T")

# The optimizer's tensors of one parameter, by their keys.
_State = dict[str, Tensor]

__all__ = ["ForeignCheckpointError", "import_checkpoint"]


def import_checkpoint(
    source: Path,
    path: Path,
    *,
    parameters: Sequence[Sequence[str]] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write what `source` holds as the checkpoint `path`, bit for bit; return `path`. One process calls it.

    `source` is what `Accelerator.save_state` saved (one process, DDP, FSDP2 or DeepSpeed), or what DeepSpeed's
    `save_checkpoint` saved (ZeRO-1, 2 or 3). All tensors must fit into this process's host memory.

    Args:
        source: the directory; of DeepSpeed, the one with the file `latest` or a tag's in it.
        path: where the checkpoint is to be; its name is step_ and the number of updates, if a run is to find it.
        parameters: the model's trainable parameters in its own order, each with all names it has (a tied one has
            several). Needed for one process and DDP where the optimizer's state knows no names: it does if the
            optimizer was made of (name, parameter) pairs.
        groups: for each of the optimizer's parameter groups, patterns of the names of its parameters, as in
            `["*.bias", "*norm*"]`. A parameter is in the first group with a pattern that fits its name. Needed where
            the state knows no names and there are several groups.
        extra: goes into the manifest; "step" is the optimizer's count unless it is given.

    Raises:
        ForeignCheckpointError: `source` is not such a checkpoint, is incomplete, or holds something unsupported, such
            as several models; or `parameters` or `groups` are missing, or do not match.
        SettingsError: `extra` can't be saved, or there is something other than a checkpoint at `path`.
        OSError: the checkpoint could not be written.
    """
    added, path = as_read(extra), with_name(path)
    try:
        with torch.device("cpu"):  # whatever torch's default device is
            accelerate.check_single(source)
            directory = deepspeed.find(source)
            found = accelerate.read(source) if directory is None else deepspeed.read(directory)
            weights, states = _by_our_names(source, found, parameters, groups)
            _check_tensors(source, weights, states)
            step = max(int(state["step"]) for state in states.values() if "step" in state)
            if not is_count(step):
                raise ForeignCheckpointError(f"{source}: its optimizer counts {step} updates")
            copies = Snapshot.of(_tensors(weights, states))
    except (ForeignCheckpointError, OSError):
        raise
    except Exception as error:
        # Pickles may hold anything, so any line above may fail, with any error.
        raise ForeignCheckpointError(
            f"{source}: its files do not fit together, or are not what they are named ({one_line(error)})"
        ) from error
    known = {"step": step, "skipped_steps": 0, "imported_from": found.maker}
    return write(path, copies, known | added)


def _by_our_names(
    source: Path,
    found: Imported,
    parameters: Sequence[Sequence[str]] | None,
    groups: Sequence[Sequence[str]] | None,
) -> tuple[dict[str, Tensor], dict[str, _State]]:
    """Return weights and states by the names that our checkpoints have: a tied parameter's first name."""
    first_names = {name: names[0] for names in parameters or [] for name in names}
    weights = _canonical(source, found.weights, first_names)
    for name in dict.fromkeys(first_names.values()):
        if name not in weights:
            raise ForeignCheckpointError(f"{source}: {name} is a parameter of --model, but not in the files")
    if found.groups is None:
        return weights, _canonical(source, found.states, first_names)
    if parameters is None:
        raise ForeignCheckpointError(
            f"{source}: its optimizer's state has no names; give --model, which has the order of its parameters"
        )
    names = [names[0] for names in parameters]
    return weights, _states_by_name(source, found.groups, _members(source, names, found.groups, groups), weights)


def _canonical(source: Path, values: dict[str, T], first_names: dict[str, str]) -> dict[str, T]:
    """Return values by names without what wrappers add, and those of a tied parameter once, by its first name."""
    return {first_names.get(name, name): value for name, value in renamed(source, values, canonical_name).items()}


def _members(
    source: Path, names: list[str], states: list[list[_State]], groups: Sequence[Sequence[str]] | None
) -> list[list[str]]:
    """Return the names of the parameters in each of the optimizer's groups."""
    sizes = [len(group) for group in states]
    if sum(sizes) != len(names):
        raise ForeignCheckpointError(
            f"{source}: its optimizer is of {sum(sizes)} parameters, but the model has {len(names)} trainable ones "
            "(--model, --frozen)"
        )
    if groups is None and len(sizes) == 1:
        return [names]
    if groups is None or len(groups) != len(sizes):
        given = "none" if groups is None else len(groups)
        raise ForeignCheckpointError(
            f"{source}: its optimizer has {len(sizes)} groups, of {', '.join(map(str, sizes))} parameters; name the "
            f"parameters of each, in this order, with patterns (--group, {given} given)"
        )
    members: list[list[str]] = [[] for _ in groups]
    for name in names:
        number = next((i for i, patterns in enumerate(groups) if any(fnmatch(name, p) for p in patterns)), None)
        if number is None:
            raise ForeignCheckpointError(f"{source}: {name} is in none of the groups that were named (--group)")
        members[number].append(name)
    return members


def _states_by_name(
    source: Path, groups: list[list[_State]], members: list[list[str]], weights: dict[str, Tensor]
) -> dict[str, _State]:
    """Return the states of groups by name: a group has its parameters in the model's order."""
    states = {}
    for number, (group, names) in enumerate(zip(groups, members, strict=True), start=1):
        if len(group) != len(names):
            raise ForeignCheckpointError(
                f"{source}: group {number} of its optimizer has {len(group)} parameters, but {len(names)} were named"
            )
        for name, state in zip(names, group, strict=True):
            shapes = {tuple(t.shape) for key, t in state.items() if key != "step" and isinstance(t, Tensor)}
            if shapes - {tuple(weights[name].shape)}:
                raise ForeignCheckpointError(
                    f"{source}: {name} has the shape {tuple(weights[name].shape)}, but the state in its place in group "
                    f"{number} has {shapes.pop()}; its optimizer had other groups, or parameters in another order"
                )
            if state:
                states[name] = state
    return states


def _check_tensors(source: Path, weights: dict[str, Tensor], states: dict[str, _State]) -> None:
    """Raise ForeignCheckpointError if tensors are missing, or are of a kind or a size that is not imported."""
    if not any("step" in state for state in states.values()):
        raise ForeignCheckpointError(f"{source}: there is no optimizer state with a step in it")
    for name in states:
        if name not in weights:
            raise ForeignCheckpointError(f"{source}: there is state of {name}, but no such weight")
    tensors = [*weights.values(), *(tensor for state in states.values() for tensor in state.values())]
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ForeignCheckpointError(f"{source}: tensors of {tensor.dtype} can't be saved")
    check_size(source, tensors)


def _tensors(weights: dict[str, Tensor], states: dict[str, _State]) -> dict[str, Tensor]:
    """Return all tensors by their names in our checkpoints."""
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    for name, state in states.items():
        for key, value in state.items():
            tensors[f"optimizer/{name}/{key}"] = value.reshape(()) if key == "step" else value
    return tensors
