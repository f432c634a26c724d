"""DeepSpeed: flat partitions of a group of parameters (ZeRO-1/2), of each parameter (ZeRO-3), or none (stage 0,
which the launchers refuse).

DeepSpeed's public accessors return copies (`safe_get_local_...`) or gather whole parameters; the views here are of the
tensors that these accessors read.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stacey_dist.sharding.fragment import Fragment, make_fragment, trainable_parameters, whole_fragment


def list_fragments(model: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    """Yield this rank's part of each parameter in the fp32 master copy, without padding.

    `optimizer` is DeepSpeed's own (of ZeRO, or what stage 0 uses), not the one inside it.
    """
    masters = _stage_0_masters(optimizer)
    for name, param in trainable_parameters(model):
        if hasattr(param, "ds_id"):
            yield from _zero_3(name, param)
        elif hasattr(param, "_hp_mapping"):
            yield from _zero_1_2(name, param, optimizer)
        else:
            master = masters.get(param, param)
            inner = getattr(optimizer, "optimizer", optimizer)
            yield whole_fragment(name, master, inner.state.get(master, {}), everywhere=True)


def refresh_weights(optimizer: Any) -> None:
    """Copy the fp32 master weights into those that the model computes with, on all ranks."""
    with torch.no_grad():
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            _refresh_zero_3(optimizer)
        elif hasattr(optimizer, "update_lp_params"):  # ZeRO-1/2, and stage 1 with fp32 accumulation
            optimizer.update_lp_params()
        else:
            for param, master in _stage_0_masters(optimizer).items():
                param.copy_(master)


def _zero_1_2(name: str, param: Any, optimizer: Any) -> Iterator[Fragment]:
    mapping = param._hp_mapping
    if mapping is None:  # no part of this parameter lies in this rank's partition
        return
    inner = optimizer.optimizer
    flat = inner.param_groups[mapping.param_group_index]["params"][0]
    start = mapping.lp_fragment_address.start
    stop = start + mapping.lp_fragment_address.numel
    offset = mapping.hp_fragment_address.start
    yield make_fragment(name, param.shape, start, stop, flat, inner.state.get(flat, {}), offset=offset)


def _zero_3(name: str, param: Any) -> Iterator[Fragment]:
    zero = param._z3_optimizer
    place = zero.grad_position.get(zero.get_param_id(param))
    if place is None:
        raise NotImplementedError(
            f"{name} is trainable, but DeepSpeed's optimizer does not update it: give it to the optimizer, or freeze it"
        )
    group, offset, partition_size = place
    flat = zero.fp32_partitioned_groups_flat[group]
    if flat is None or flat.numel() == 0:
        raise NotImplementedError(f"{name}: weights or states that DeepSpeed offloads to NVMe are not supported")
    ranks = dist.get_world_size(param.ds_process_group)
    start = min(dist.get_rank(param.ds_process_group) * partition_size, param.ds_numel)
    stop = min(start + partition_size, param.ds_numel)  # the rest is padding
    state = zero.optimizer.state.get(flat, {})
    replica, replicas = dist.get_rank() // ranks, dist.get_world_size() // ranks  # MiCS: groups of neighbouring ranks
    yield make_fragment(
        name, param.ds_shape, start, stop, flat, state, offset=offset, replica=replica, replicas=replicas
    )


def _refresh_zero_3(zero: Any) -> None:
    zero.checkpoint_event_prologue()  # partitions small parameters that stay gathered; the epilogue gathers them again
    for index, master in enumerate(zero.fp32_partitioned_groups_flat):
        flat, parts = zero.fp16_partitioned_groups_flat[index], zero.fp16_partitioned_groups[index]
        flat.copy_(master)
        for part, updated in zip(parts, zero.unflatten(flat, parts), strict=True):
            part.data = updated
    zero.checkpoint_event_epilogue()


def _stage_0_masters(optimizer: Any) -> dict[Tensor, Tensor]:
    """Return the fp32 master of each parameter where stage 0 trains in bf16 or fp16; nothing in fp32."""
    if not (hasattr(optimizer, "fp16_groups") and hasattr(optimizer, "fp32_groups")):
        return {}
    return {
        param: master
        for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for param, master in zip(params, masters, strict=True)
    }
