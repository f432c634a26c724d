"""A sharded model's tensors put together on one process, and taken apart again; no engine is known here.

The process that writes holds one whole copy in host memory.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stacey_dist.sharding import Fragment, base_optimizer, fragments, refresh_weights
from stacey_dist.sharding.fragment import canonical_name


@dataclass(frozen=True)
class Tensors:
    """A model's parameters and persistent buffers by name, and its optimizer's state as NAME/KEY."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather_tensors(model: nn.Module, optimizer: Any) -> Tensors | None:
    """The whole tensors on rank 0, None on the others; all ranks call it together.

    Weights are fp32 masters where the engine has them. Tensors that rank 0 holds as a whole are not copied.
    """
    mine = [f for f in fragments(model, optimizer) if f.replica == 0]
    rest = _untrained_tensors(model)
    if _world_size() == 1:
        everyone = [[_describe(f) for f in mine]]
    else:
        gathered: list[Any] = [None] * _world_size()
        dist.gather_object([_describe(f) for f in mine], gathered if dist.get_rank() == 0 else None)
        everyone = gathered
    if dist.is_initialized() and dist.get_rank() > 0:
        for fragment in mine:
            for tensor in _elements(fragment).values():
                dist.send(tensor.detach().reshape(-1).to(_transport_device()), dst=0)
        return None
    result = Tensors(rest, {})
    steps: dict[str, Tensor] = {}
    for rank, descriptions in enumerate(everyone):
        for index, described in enumerate(descriptions):
            local = _elements(mine[index]) if rank == 0 else {}
            for key, dtype in described.dtypes.items():
                target, name = (
                    (result.model, described.name) if key == "" else (result.optimizer, f"{described.name}/{key}")
                )
                if rank == 0 and described.stop - described.start == described.shape.numel():
                    target[name] = local[key].reshape(described.shape)
                    continue
                if name not in target:
                    target[name] = torch.empty(described.shape, dtype=dtype)
                part = target[name].view(-1)[described.start : described.stop]
                if rank == 0:
                    part.copy_(local[key].reshape(-1))
                else:
                    received = torch.empty(part.numel(), dtype=dtype, device=_transport_device())
                    dist.recv(received, src=rank)
                    part.copy_(received)
            if described.step is not None:
                steps[f"{described.name}/step"] = torch.tensor(described.step)
    result.optimizer.update(steps)
    return result


def scatter_tensors(saved: Mapping[str, Any], states: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
    """Write whole tensors into the fragments of this rank, bit for bit, replacing all optimizer state.

    Args:
        saved: whole tensors by name, of every parameter and persistent buffer (a mapping that reads them one at a
            time from a file, for one).
        states: the optimizer's state as NAME/KEY.
        model: the model on its engine.
        optimizer: its optimizer on its engine.
    """
    base = base_optimizer(optimizer)
    base.state.clear()
    keys: dict[str, list[str]] = {}
    for full_name in states:
        name, key = full_name.rsplit("/", 1)
        keys.setdefault(name, []).append(key)
    with torch.no_grad():
        for f in fragments(model, optimizer, empty=True):
            f.weight.copy_(_part(saved[f.name], f))
            for key in keys.get(f.name, []):
                value = states[f"{f.name}/{key}"]
                if key == "step":
                    # On the CPU, where torch's optimizers keep it, unless they are fused for a GPU.
                    base.state[f.owner][key] = value.to(f.owner.device if _fused(base) else "cpu", copy=True)
                elif key not in base.state[f.owner]:
                    base.state[f.owner][key] = torch.zeros_like(f.owner, dtype=value.dtype, requires_grad=False)
        for f in fragments(model, optimizer):
            for key, target in f.state.items():
                target.copy_(_part(states[f"{f.name}/{key}"], f))
        _write_untrained(model, saved)
    refresh_weights(model, optimizer)


def shapes(model: nn.Module, optimizer: Any) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
    """Shape of every parameter and persistent buffer by name, and its dtype where this rank knows it.

    An engine may keep frozen parameters and buffers in another dtype than they were saved in; they are converted.
    """
    dtypes = {f.name: f.weight.dtype for f in fragments(model, optimizer)}
    found: dict[str, tuple[torch.Size, torch.dtype | None]] = {}
    for full_name, param in model.named_parameters():
        name = canonical_name(full_name)
        found[name] = (getattr(param, "ds_shape", param.shape), dtypes.get(name))
    found.update({name: (buffer.shape, None) for name, buffer in _persistent_buffers(model)})
    return found


@dataclass(frozen=True)
class _Description:
    """What rank 0 must know of a fragment to receive it."""

    name: str
    shape: torch.Size
    start: int
    stop: int
    dtypes: dict[str, torch.dtype]
    step: float | None


def _describe(f: Fragment) -> _Description:
    dtypes = {key: tensor.dtype for key, tensor in _elements(f).items()}
    return _Description(f.name, f.shape, f.start, f.stop, dtypes, None if f.step is None else float(f.step))


def _elements(f: Fragment) -> dict[str, Tensor]:
    """The weight under "", and the states, in an order that all ranks share."""
    return {"": f.weight, **{key: f.state[key] for key in sorted(f.state)}}


def _part(whole: Tensor, f: Fragment) -> Tensor:
    return whole.reshape(-1)[f.start : f.stop].view(f.weight.shape)


def _fused(optimizer: Any) -> bool:
    """Whether the optimizer is one of torch's fused ones, which keep their step count on the device."""
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _transport_device() -> torch.device:
    """Where the process group moves tensors from and to: NCCL knows GPUs alone."""
    device = torch.accelerator.current_accelerator()
    if device is None or "cpu" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return torch.device(device.type, torch.accelerator.current_device_index())


def _persistent_buffers(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    persistent = {canonical_name(name) for name in model.state_dict()}
    for name, buffer in model.named_buffers():
        if canonical_name(name) in persistent:
            yield canonical_name(name), buffer


def _frozen(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    for name, param in model.named_parameters():
        if not param.requires_grad:
            yield canonical_name(name), param


def _untrained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Frozen parameters and persistent buffers as wholes."""
    tensors = {}
    for name, param in _frozen(model):
        with _gathered(param, write=False):
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param.detach()
            tensors[name] = whole.clone() if hasattr(param, "ds_id") else whole
    tensors.update({name: buffer.detach() for name, buffer in _persistent_buffers(model)})
    return tensors


def _write_untrained(model: nn.Module, saved: Mapping[str, Any]) -> None:
    for name, param in _frozen(model):
        with _gathered(param, write=True):
            if hasattr(param, "full_tensor"):
                param.copy_(_distributed(saved[name], param))
            else:
                param.copy_(saved[name])
    for name, buffer in _persistent_buffers(model):
        buffer.copy_(saved[name])


def _distributed(whole: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _gathered(param: Any, *, write: bool) -> AbstractContextManager[Any]:
    """Within it, a parameter that ZeRO-3 has partitioned is whole; what rank 0 writes is kept if `write`."""
    if not hasattr(param, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([param], modifier_rank=0 if write else None)
