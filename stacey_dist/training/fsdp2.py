"""Shard a model and its optimizer with FSDP2, through Accelerate."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer

from stacey_dist.sharding.fragment import canonical_name
from stacey_dist.training.initial_weights import allocate
from stacey_dist.training.processes.launch import loads_weights_from_rank0
from stacey_dist.training.processes.launch_settings import configuration_errors


def shard(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
    """Return the sharded model and its optimizer.

    The weights of `model` are on the meta device, on rank 0 only, or on every rank.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:  # Accelerate would have processes add gradients in bf16
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
    on_meta = any(param.is_meta for param in model.parameters())
    # Whether Accelerate sends rank 0's weights to the others, one at a time.
    plugin.cpu_ram_efficient_loading = not on_meta and loads_weights_from_rank0(accelerator, model)
    names = {param: canonical_name(name) for name, param in model.named_parameters()}
    groups = [[names[param] for param in group["params"]] for group in optimizer.param_groups]
    with configuration_errors("the configuration of `accelerate launch`"):
        sharded, wrapped = accelerator.prepare(model, optimizer)
    if on_meta:
        offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        allocate(model.parameters(), torch.device("cpu") if offloaded else accelerator.device)
        # Accelerate tells parameters by their addresses, and these had none.
        params = {canonical_name(name): param for name, param in model.named_parameters()}
        for group, members in zip(wrapped.param_groups, groups, strict=True):
            group["params"] = [params[name] for name in members]
    return sharded, wrapped
