"""Reject unsupported ways to split a model over ranks, by name, so that none is mistaken for a replica."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

# What classes of models and optimizers belong to, by the modules that define them: to compare names, none of these
# libraries has to be installed.
_CLASSES = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.": "FSDP1 (FullyShardedDataParallel)",
    "torch.distributed.pipelining.": "pipeline parallelism (torch.distributed.pipelining)",
    "torch.distributed.optim.": "an optimizer of torch.distributed.optim other than ZeroRedundancyOptimizer",
    "deepspeed.runtime.pipe.": "DeepSpeed's pipeline parallelism",
    "deepspeed.moe.": "DeepSpeed's mixture of experts",
    "fairscale.": "fairscale",
    "megatron.": "Megatron",
    "colossalai.": "ColossalAI",
    "apex.contrib.optimizers.distributed": "a distributed optimizer of apex",
    "horovod.": "Horovod",
    "torchrec.": "TorchRec",
    "torch_xla.": "PyTorch/XLA's sharding",
    "neuronx_distributed.": "NeuronX Distributed",
    "nanotron.": "nanotron",
    "vescale.": "veScale",
}


def refuse_unsupported(model: Any, optimizer: Any) -> None:
    """Raise NotImplementedError naming the first thing in a model or its optimizer that splits it in an unknown way.

    Raises TypeError if the model is no `torch.nn.Module`.
    """
    for wrapper in (model, *wrapped(optimizer)):
        _refuse_class(type(wrapper))
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__qualname__}")
    for module in model.modules():
        _refuse_class(type(module))
    several = dist.is_initialized() and dist.get_world_size() > 1
    for name, param in model.named_parameters():
        if getattr(param, "_is_flat_param", False) or hasattr(param, "_fsdp_flattened"):
            raise _error(_CLASSES["torch.distributed.fsdp.fully_sharded_data_parallel."], f"parameter {name}")
        dim = getattr(param, "partition_dim", None)
        if several and (getattr(param, "tensor_model_parallel", False) or (isinstance(dim, int) and dim >= 0)):
            raise _error("tensor parallelism", f"parameter {name}, which is marked as split (tensor_model_parallel)")
        if several and not getattr(param, "allreduce", True):
            raise _error("expert parallelism", f"parameter {name}, which is marked as an expert's (allreduce = False)")
    if type(model).__module__.startswith("deepspeed.") and getattr(model, "mp_world_size", 1) > 1:
        raise _error("model parallelism", "the DeepSpeed engine")


def wrapped(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizer and those inside it, the outermost first."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)


def _refuse_class(found: type) -> None:
    if issubclass(found, ZeroRedundancyOptimizer):
        return
    for ancestor in found.__mro__:
        where = f"{ancestor.__module__}.{ancestor.__qualname__}"
        for prefix, name in _CLASSES.items():
            if where.startswith(prefix):
                raise _error(name, found.__qualname__)


def _error(name: str, found: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} is not supported (found {found}). Supported are DistributedDataParallel, ZeroRedundancyOptimizer, "
        "DeepSpeed ZeRO-0/1/2/3, and fully_shard (FSDP2, HSDP)"
    )
