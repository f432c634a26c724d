"""DeepSpeed's checkpoints, of ZeRO-1, 2 and 3."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError, Imported, load
from stacey_dist.checkpoint.schema import is_count
from stacey_dist.files import open_regular

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

# A group's flat tensors on one rank: the masters under "", and each key of the optimizer's state.
_Flat = dict[str, Tensor]


def made(source: Path) -> bool:
    """Whether the directory is DeepSpeed's, or has one of its tags in it."""
    return _tag(source) is not None


def _tag(source: Path) -> Path | None:
    candidates = [source]
    latest = source / "latest"
    if latest.is_file():
        with open_regular(latest) as opened:
            tag = opened.read(1000).decode().strip()
        if "/" in tag or "\0" in tag or tag == "..":
            raise ForeignCheckpointError(f"{latest}: {tag!a} is not the name of a directory beside it")
        candidates.append(source / tag)
    return next((path for path in candidates if any(path.glob("*zero_pp_rank_*_optim_states.pt"))), None)


def read(source: Path, parameters: Sequence[Sequence[str]] | None = None) -> Imported:
    """All ranks' files put together. The files have the parameters' names. Raises ForeignCheckpointError."""
    directory = _tag(source)
    assert directory is not None
    files = {}
    for file in directory.glob("*zero_pp_rank_*_optim_states.pt"):
        match = _RANK.search(file.name)
        if match is None or int(match[2]) != 0:
            raise ForeignCheckpointError(f"{file}: model-parallel checkpoints are not read")
        files[int(match[1])] = file
    states = [_load(files[rank])["optimizer_state_dict"] for rank in sorted(files)]
    counts = states[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else int(counts)
    if len(files) != world_size or sorted(files) != list(range(world_size)):
        raise ForeignCheckpointError(f"{directory}: there are files of ranks {sorted(files)} out of {world_size}")
    stage_3 = "fp32_flat_groups" in states[0]
    described = _model_states(directory, world_size if stage_3 else 1)
    weights: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    shapes = described[0]["param_shapes"]
    if not all(is_count(n) for group in shapes for shape in group.values() for n in shape):
        raise ForeignCheckpointError(f"{directory}: param_shapes has what is no shape")
    if stage_3:
        groups = _groups_3(states, directory)
        _split_3(groups, {name: shape for group in shapes for name, shape in group.items()}, weights, found)
    else:
        groups = _groups_1_2(states, directory)
        for group, ranks in zip(shapes, groups, strict=True):
            _split_1_2(ranks, group, weights, found, directory)
    _add_the_rest(described, weights, stage_3)
    return Imported(f"DeepSpeed ZeRO-{3 if stage_3 else '1 or 2'} on {world_size}", weights, found)


def _load(file: Path) -> dict[str, Any]:
    """What a file holds, if that is a dictionary. Raises ForeignCheckpointError."""
    content = load(file)
    if not isinstance(content, dict):
        raise ForeignCheckpointError(f"{file}: it holds a {type(content).__name__} where a dictionary belongs")
    return content


def _model_states(directory: Path, count: int) -> list[dict[str, Any]]:
    """What describes the model, by rank: ZeRO-3 has one for each, the others one for all."""
    if count == 1 and (directory / "mp_rank_00_model_states.pt").exists():
        return [_load(directory / "mp_rank_00_model_states.pt")]
    prefixes = ("zero_pp_rank", "bf16_zero_pp_rank")
    names = [[f"{prefix}_{rank}_mp_rank_00_model_states.pt" for prefix in prefixes] for rank in range(count)]
    described = []
    for either in names:
        file = next((directory / name for name in either if (directory / name).exists()), None)
        if file is None:
            raise ForeignCheckpointError(f"{directory / either[0]} is missing")
        described.append(_load(file))
    return described


def _add_the_rest(described: list[dict[str, Any]], weights: dict[str, Tensor], stage_3: bool) -> None:
    """Frozen parameters and buffers."""
    module = described[0]["module"]
    if stage_3:
        for name, shape in (described[0].get("frozen_param_shapes") or {}).items():
            pieces = [part["frozen_param_fragments"][name].reshape(-1) for part in described]
            weights[name] = torch.cat(pieces)[: math.prod(shape)].reshape(shape)
        for name in described[0].get("buffer_names") or []:
            weights[name] = module[name]
        return
    tied = {module[name].data_ptr() for name in weights if name in module}  # the file keeps what is shared
    for name, tensor in module.items():
        if name not in weights and tensor.data_ptr() not in tied:
            weights[name] = tensor


def _groups_1_2(states: list[dict[str, Any]], directory: Path) -> list[list[_Flat]]:
    """By group, then by rank."""
    groups: list[list[_Flat]] = []
    for index in range(len(states[0]["single_partition_of_fp32_groups"])):
        ranks = []
        for state in states:
            base = state["base_optimizer_state"]
            mine = base[index] if isinstance(base, list) else base["state"].get(index, {})
            ranks.append({"": state["single_partition_of_fp32_groups"][index], **_tensors(mine, directory)})
        groups.append(ranks)
    return groups


def _groups_3(states: list[dict[str, Any]], directory: Path) -> list[list[_Flat]]:
    """By sub-group, then by rank."""
    groups: list[list[_Flat]] = []
    for index in range(len(states[0]["fp32_flat_groups"])):
        ranks = []
        for state in states:
            mine = state["optimizer_state_dict"]["state"].get(index, {})
            ranks.append({"": state["fp32_flat_groups"][index], **_tensors(mine, directory)})
        groups.append(ranks)
    return groups


def _tensors(state: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    tensors = {key: torch.as_tensor(value) for key, value in state.items()}
    if "step" not in tensors:
        raise ForeignCheckpointError(f"{directory}: the optimizer's state has no step, but {sorted(tensors)}")
    tensors["step"] = tensors["step"].reshape(())
    return tensors


def _split_1_2(
    ranks: list[_Flat],
    shapes: dict[str, Any],
    weights: dict[str, Tensor],
    states: dict[str, dict[str, Tensor]],
    directory: Path,
) -> None:
    """The group's parameters lie one after the other in the ranks' partitions, and padding at the end."""
    whole = {key: ranks[0][key] if key == "step" else torch.cat([rank[key] for rank in ranks]) for key in ranks[0]}
    position = 0
    for name, shape in shapes.items():
        stop = position + math.prod(shape)
        if stop > whole[""].numel():
            raise ForeignCheckpointError(f"{directory}: {name} is not all there")
        part = {key: t if key == "step" else t[position:stop].reshape(shape) for key, t in whole.items()}
        weights[name] = part.pop("")
        states[name] = part
        position = stop


def _split_3(
    groups: list[list[_Flat]],
    shapes: dict[str, Any],
    weights: dict[str, Tensor],
    states: dict[str, dict[str, Tensor]],
) -> None:
    """Each parameter is cut into as many pieces as there are ranks, the last one padded; sub-groups hold whole ones."""
    index, position = 0, 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        piece = -(-count // len(groups[0]))
        while position >= groups[index][0][""].numel():
            index, position = index + 1, 0
        ranks = groups[index]
        part = {
            key: ranks[0][key]
            if key == "step"
            else torch.cat([rank[key][position : position + piece] for rank in ranks])[:count].reshape(shape)
            for key in ranks[0]
        }
        weights[name] = part.pop("")
        states[name] = part
        position += piece
