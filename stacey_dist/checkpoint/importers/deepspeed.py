"""Read DeepSpeed's checkpoints, of ZeRO-1, 2 and 3."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError, Imported, check_size, load
from stacey_dist.checkpoint.schema import is_count
from stacey_dist.files import open_regular

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

# A group's flat tensors on one rank: the masters under "", and each key of the optimizer's state.
_Flat = dict[str, Tensor]


def find(source: Path) -> Path | None:
    """Return the directory of DeepSpeed's files: `source`, or the one in it that its file `latest` names."""
    candidates = [source]
    latest = source / "latest"
    if latest.is_file():
        with open_regular(latest) as opened:
            tag = opened.read(1000).decode().strip()
        if "/" in tag or "\0" in tag or tag == "..":
            raise ForeignCheckpointError(f"{latest}: {tag!a} is not the name of a directory beside it")
        candidates.append(source / tag)
    return next((path for path in candidates if any(path.glob("*zero_pp_rank_*_optim_states.pt"))), None)


def read(directory: Path) -> Imported:
    """Put all ranks' files together. Raises ForeignCheckpointError."""
    states = _optimizer_states(directory)
    stage_3 = "fp32_flat_groups" in states[0]
    described = _model_states(directory, len(states) if stage_3 else 1)
    shapes = described[0]["param_shapes"]
    if not all(is_count(n) for group in shapes for shape in group.values() for n in shape):
        raise ForeignCheckpointError(f"{directory}: param_shapes holds something that is not a shape")
    masters = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
    groups = [[_flat(directory, state, masters, index) for state in states] for index in range(len(states[0][masters]))]
    flat = [tensor for group in groups for rank in group for tensor in rank.values()]
    frozen = [fragment for part in described for fragment in (part.get("frozen_param_fragments") or {}).values()]
    check_size(directory, flat + frozen)
    found = Imported(f"DeepSpeed ZeRO-{3 if stage_3 else '1 or 2'} on {len(states)}", {})
    if stage_3:
        every = {name: shape for group in shapes for name, shape in group.items()}
        _split(directory, groups, every, [0] * len(every), 0, found)
    else:
        # `zero_optimization.parameter_alignment` leaves gaps between parameters, and every group has some at its end.
        gaps = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        for group, ranks, between in zip(shapes, groups, gaps, strict=True):
            _split(directory, [[_joined(ranks)]], group, between, 2 * len(states) - 1, found)
    _add_the_rest(described, found.weights, stage_3)
    return found


def _load(file: Path) -> dict[str, Any]:
    """Load a file that holds a dictionary. Raises ForeignCheckpointError."""
    content = load(file)
    if not isinstance(content, dict):
        raise ForeignCheckpointError(f"{file}: it holds a {type(content).__name__} where a dictionary belongs")
    return content


def _optimizer_states(directory: Path) -> list[dict[str, Any]]:
    """Load each rank's part of the optimizer. Raises ForeignCheckpointError unless all are there."""
    files = {}
    for file in directory.glob("*zero_pp_rank_*_optim_states.pt"):
        match = _RANK.search(file.name)
        if match is None or int(match[2]) != 0:
            raise ForeignCheckpointError(f"{file}: model-parallel checkpoints are not read")
        files[int(match[1])] = file
    states = [_load(files[rank])["optimizer_state_dict"] for rank in sorted(files)]
    counts = states[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else int(counts)
    if sorted(files) != list(range(world_size)):
        raise ForeignCheckpointError(f"{directory}: there are files of ranks {sorted(files)} out of {world_size}")
    return states


def _model_states(directory: Path, count: int) -> list[dict[str, Any]]:
    """Load what describes the model: ZeRO-3 has a file for each rank, the others one for all."""
    if count == 1 and (directory / "mp_rank_00_model_states.pt").exists():
        return [_load(directory / "mp_rank_00_model_states.pt")]
    described = []
    for rank in range(count):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        file = next((file for file in (directory / name, directory / f"bf16_{name}") if file.exists()), None)
        if file is None:
            raise ForeignCheckpointError(f"{directory / name} is missing")
        described.append(_load(file))
    return described


def _add_the_rest(described: list[dict[str, Any]], weights: dict[str, Tensor], stage_3: bool) -> None:
    """Add frozen parameters and buffers."""
    module = described[0]["module"]
    if stage_3:
        for name, shape in (described[0].get("frozen_param_shapes") or {}).items():
            pieces = [part["frozen_param_fragments"][name].reshape(-1) for part in described]
            weights[name] = torch.cat(pieces)[: math.prod(shape)].reshape(shape)
        for name in described[0].get("buffer_names") or []:
            weights[name] = module[name]
        return
    tied = {module[name].data_ptr() for name in weights if name in module}  # tied parameters share memory here, too
    for name, tensor in module.items():
        if name not in weights and tensor.data_ptr() not in tied:
            weights[name] = tensor


def _flat(directory: Path, state: dict[str, Any], masters: str, index: int) -> _Flat:
    """Return one rank's flat tensors of a group."""
    base = state["optimizer_state_dict"] if "optimizer_state_dict" in state else state["base_optimizer_state"]
    mine = base[index] if isinstance(base, list) else base["state"].get(index, {})
    tensors = {key: torch.as_tensor(value) for key, value in mine.items()}
    if "step" not in tensors:
        raise ForeignCheckpointError(f"{directory}: the optimizer's state has no step, but {sorted(tensors)}")
    return tensors | {"": state[masters][index], "step": tensors["step"].reshape(())}


def _joined(ranks: list[_Flat]) -> _Flat:
    """Return a group that the ranks have cut into equal pieces, as it was before."""
    return {key: ranks[0][key] if key == "step" else torch.cat([rank[key] for rank in ranks]) for key in ranks[0]}


def _split(
    directory: Path,
    groups: list[list[_Flat]],
    shapes: dict[str, Any],
    gaps: list[int],
    most_at_end: int,
    found: Imported,
) -> None:
    """Take parameters and their states out of flat groups, in each of which some lie one after another.

    Each parameter is cut into as many pieces as there are ranks, the last one padded.

    Args:
        directory: where they were read.
        groups: flat tensors by group and rank.
        shapes: the parameters' shapes in the order of the groups.
        gaps: how many elements are left out after each parameter.
        most_at_end: how many there may be after the last one.
        found: gets the parameters.

    Raises ForeignCheckpointError unless the flat tensors have the elements of these parameters and no more.
    """
    if not all(map(is_count, gaps)):
        raise ForeignCheckpointError(f"{directory}: param_alignment_paddings holds something that is not a count")
    needed = sum(-(-math.prod(shape) // len(groups[0])) for shape in shapes.values()) + sum(gaps)
    for rank in range(len(groups[0])):
        for key in groups[0][rank].keys() - {"step"}:
            there = sum(group[rank][key].numel() for group in groups)
            if not needed <= there <= needed + most_at_end:
                raise ForeignCheckpointError(
                    f"{directory}: {key or 'the weights'} of rank {rank} should have {needed} elements, but there are "
                    f"{there}; it was saved in another layout, as that of MiCS, or not completely"
                )
    index, position = 0, 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        count = math.prod(shape)
        while count and position >= groups[index][0][""].numel():
            index, position = index + 1, 0
        ranks = groups[index]
        stop = position + -(-count // len(ranks))
        part = {
            key: values
            if key == "step"
            else torch.cat([rank[key][position:stop] for rank in ranks])[:count].reshape(shape)
            for key, values in ranks[0].items()
        }
        found.weights[name] = part.pop("")
        found.states[name] = part
        position = stop + gap
