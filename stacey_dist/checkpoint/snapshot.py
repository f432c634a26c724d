"""What a rank writes of a model and its optimizer, and how what was read goes back; no engine is known here."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stacey_dist.checkpoint.shard import Range
from stacey_dist.checkpoint.together import rank, world_size
from stacey_dist.errors import SettingsError
from stacey_dist.optim.base import ElementwiseOptimizer
from stacey_dist.sharding import base_optimizer, fragments, refresh_weights
from stacey_dist.sharding.fragment import Fragment, canonical_name, trainable_parameters

# Tensors that are read as wholes, as frozen parameters are on each rank, are read this much at a time.
_BATCH_BYTES = 1 << 30

# The shape and the dtype's name of each whole tensor, by name.
Contents = Mapping[str, tuple[tuple[int, ...], str]]


def take(
    model: nn.Module, optimizer: Any, host_memory: dict[str, Tensor] | None = None
) -> tuple[dict[str, Range], Contents]:
    """Copies in host memory of the ranges that this rank is to write, and the tensors that they are of.

    Each element of `model/NAME` (weights, fp32 masters where the engine has them; frozen parameters; persistent
    buffers) and `optimizer/NAME/KEY` (z, m, step, or another optimizer's state) is with exactly one rank.
    All ranks call it together.

    Args:
        model: the model on its engine.
        optimizer: its optimizer on its engine.
        host_memory: flat tensors of an earlier call, by name, to copy into again where they fit; is brought up to
            date. New memory costs more time than the copy.
    """
    _check_names(model)
    base = base_optimizer(optimizer)
    host_memory = {} if host_memory is None else host_memory
    ranges: dict[str, Range] = {}
    contents: dict[str, tuple[tuple[int, ...], str]] = {}

    def add(name: str, shape: Iterable[int], start: int, values: Tensor, *, trained: bool = False) -> None:
        shape = torch.Size(shape)
        values = values.detach().reshape(-1)
        flat = host_memory.get(name)
        if flat is None or (flat.numel(), flat.dtype) != (values.numel(), values.dtype):
            flat = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            host_memory[name] = flat
        flat.copy_(values, non_blocking=True)
        ranges[name] = Range(start, flat, trained)
        contents[name] = (tuple(shape), dtype_name(flat.dtype))

    for f in fragments(model, optimizer):
        for key, value in base.state.get(f.owner, {}).items():
            if isinstance(value, Tensor) and key != "step" and key not in f.state:
                raise SettingsError(
                    f"{type(base).__name__} keeps {key} of {f.name} in the shape {tuple(value.shape)}; only state that "
                    "is shaped as its parameter can be saved"
                )
        # Ranks that hold the same share the work.
        count = f.stop - f.start
        first, last = (count * replica // f.replicas for replica in (f.replica, f.replica + 1))
        if first < last:
            start, part = f.start + first, slice(first, last)
            add(f"model/{f.name}", f.shape, start, f.weight.reshape(-1)[part], trained=True)
            for key, value in f.state.items():
                add(f"optimizer/{f.name}/{key}", f.shape, start, value.reshape(-1)[part], trained=True)
        if f.step is not None and f.start == 0 and f.replica == 0:
            add(f"optimizer/{f.name}/step", (), 0, _exact(f.step))
    for name, param in trainable_parameters(model):  # an empty one has no fragment, but is a part of the model
        shape = getattr(param, "ds_shape", param.shape)
        if shape.numel() == 0:
            contents[f"model/{name}"] = (tuple(shape), dtype_name(param.dtype))
    # Frozen parameters are whole for a moment, one after another; the ranks take turns in keeping them.
    for number, (name, param) in enumerate(_frozen(model)):
        with _gathered(param, write=False):
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param
            if number % world_size() == rank():
                add(f"model/{name}", whole.shape, 0, whole)
    for name, buffer in _persistent_buffers(model):  # statistics may differ between ranks, and belong together
        if rank() == 0:
            add(f"model/{name}", buffer.shape, 0, buffer)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return ranges, contents


def put(contents: Contents, read: Callable[[dict[str, Range]], None], model: nn.Module, optimizer: Any) -> None:
    """Fill the fragments of this rank, bit for bit, and replace all optimizer state. All ranks call it together.

    Args:
        contents: the tensors that there are; `misfits` must have found nothing against them.
        read: fills ranges, given by name.
        model: the model on its engine.
        optimizer: its optimizer on its engine.
    """
    keys: dict[str, list[str]] = {}
    for full_name in contents:
        kind, _, name = full_name.partition("/")
        if kind == "optimizer":
            keys.setdefault(name.rpartition("/")[0], []).append(name.rpartition("/")[2])
    base = base_optimizer(optimizer)
    base.state.clear()
    groups = {param: group for group in base.param_groups for param in group["params"]}

    def group_of(f: Fragment) -> dict[str, Any]:
        # ZeRO-3's groups hold its tensors in a step only; the first group's settings stand for them.
        found: dict[str, Any] = groups.get(f.owner, base.param_groups[0])
        return found

    with torch.no_grad():
        for f in fragments(model, optimizer, empty=True):
            state = base.state[f.owner]
            for key in keys.get(f.name, []):
                if key == "step":
                    # On the CPU, where optimizers keep it, unless they are fused for a GPU or capturable.
                    on_device = _steps_on_device(base, group_of(f))
                    dtype = _step_dtype(base)
                    state[key] = torch.zeros((), dtype=dtype, device=f.owner.device if on_device else "cpu")
                elif key not in state:
                    dtype = getattr(torch, contents[f"optimizer/{f.name}/{key}"][1])
                    state[key] = torch.zeros_like(f.owner, dtype=dtype, requires_grad=False)
        # Into the very tensors: a second copy would be as large as this rank's share of everything.
        wanted: dict[str, Range] = {}
        scattered: list[tuple[Tensor, Tensor]] = []
        unsaved: list[tuple[Fragment, str, Tensor]] = []  # no update so far, in one tensor with others that had some

        def flat(target: Tensor) -> Tensor:
            if target.is_contiguous():
                return target.view(-1)
            # Checkpoints are in row-major order, and this tensor is not: channels_last, for one.
            scattered.append((target, torch.empty(target.numel(), dtype=target.dtype, device=target.device)))
            return scattered[-1][1]

        for f in fragments(model, optimizer, empty=True):
            wanted[f"model/{f.name}"] = Range(f.start, flat(f.weight))
            for key, target in f.state.items():
                if f"optimizer/{f.name}/{key}" in contents:
                    wanted[f"optimizer/{f.name}/{key}"] = Range(f.start, flat(target))
                else:
                    unsaved.append((f, key, target))
            if f.step is not None and f"optimizer/{f.name}/step" in contents:
                wanted[f"optimizer/{f.name}/step"] = Range(0, f.step.view(1))
        rest_kinds = list(batches({name: contents[f"model/{name}"] for name in _rest_shapes(model)}))
        for kinds in rest_kinds or [{}]:  # the first one with all else: each reading may open every file
            rest = {name: torch.empty(math.prod(shape), dtype=dtype) for name, (shape, dtype) in kinds.items()}
            wanted |= {f"model/{name}": Range(0, values) for name, values in rest.items()}
            read(wanted)
            _write_rest(model, rest)
            wanted = {}
        for target, values in scattered:
            target.copy_(values.view(target.shape))
        for f, key, target in unsaved:  # as the optimizer itself begins
            if key == "z" and group_of(f).get("z_init") == "params":
                target.copy_(f.weight)
    refresh_weights(model, optimizer)


def misfits(contents: Contents, model: nn.Module, optimizer: Any) -> list[str]:
    """What keeps these tensors from being put into the model, a line each; the same on every rank.

    Frozen parameters and buffers may have another dtype here; an engine's masters are compared where they are.
    """
    _check_names(model)
    dtypes = {f"model/{f.name}": dtype_name(f.weight.dtype) for f in fragments(model, optimizer)}
    here = {f"model/{name}": tuple(shape) for name, shape in _shapes(model).items()}
    there = {name: kind for name, kind in contents.items() if name.startswith("model/")}
    found = []
    for name in sorted(here.keys() | there.keys()):
        short, saved = name.removeprefix("model/"), there.get(name)
        dtype = dtypes.get(name, saved[1] if saved else "")
        if saved is None or name not in here or saved != (here[name], dtype):
            ours = f"{here[name]} {dtype}" if name in here else "absent"
            found.append(f"{short} is {f'{saved[0]} {saved[1]}' if saved else 'absent'} there, and {ours} here")
    for full_name, (shape, _) in contents.items():
        name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
        if full_name.startswith("optimizer/") and (
            f"model/{name}" not in here or (key != "step" and shape != here[f"model/{name}"])
        ):
            found.append(f"the state {name}/{key} does not fit a parameter here")
    keys = {name.rpartition("/")[2] for name in contents if name.startswith("optimizer/")} - {"step"}
    ours_keys = set(getattr(base_optimizer(optimizer), "state_names", keys))
    if keys and keys != ours_keys:
        found.append(
            f"the optimizer's state is {', '.join(sorted(keys))} there, and {', '.join(sorted(ours_keys))} here"
        )
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as "float32"."""
    return str(dtype).removeprefix("torch.")


def _exact(step: Tensor) -> Tensor:
    """A count of updates in a dtype that holds it: an integer as int64, one of torch's optimizers as float32."""
    return step.to(torch.float32 if step.is_floating_point() else torch.int64)


def _step_dtype(optimizer: Any) -> torch.dtype:
    """The dtype in which an optimizer counts its updates. A count that was saved in another is converted."""
    return torch.int64 if isinstance(optimizer, ElementwiseOptimizer) else torch.float32


def _steps_on_device(optimizer: Any, group: dict[str, Any]) -> bool:
    """Whether a group's step counts are kept beside its parameters, as fused and capturable optimizers do."""
    fused = isinstance(optimizer, torch.optim.Adam) and bool(group.get("fused"))
    return fused or bool(group.get("capturable"))


def _check_names(model: nn.Module) -> None:
    """Refuse a model in which two tensors have one name once what wrappers add is left out."""
    for names in (model.named_parameters(), model.named_buffers()):
        seen: dict[str, str] = {}
        for full_name, _ in names:
            name = canonical_name(full_name)
            if name in seen:
                raise SettingsError(f"{seen[name]} and {full_name} of the model would both be saved as {name}")
            seen[name] = full_name


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter and persistent buffer by name, whatever an engine has made of it."""
    shapes = {canonical_name(n): getattr(p, "ds_shape", p.shape) for n, p in model.named_parameters()}
    return shapes | {name: buffer.shape for name, buffer in _persistent_buffers(model)}


def _rest_shapes(model: nn.Module) -> dict[str, torch.Size]:
    names = {name for name, _ in _frozen(model)} | {name for name, _ in _persistent_buffers(model)}
    return {name: shape for name, shape in _shapes(model).items() if name in names}


def batches(contents: Contents) -> Iterator[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """The shapes and dtypes of tensors, so many at a time as make up some `_BATCH_BYTES`."""
    batch: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    size = 0
    for name, (shape, dtype) in contents.items():
        batch[name] = shape, getattr(torch, dtype)
        size += math.prod(shape) * batch[name][1].itemsize
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    persistent = {canonical_name(name) for name in model.state_dict()}
    named = ((canonical_name(name), buffer) for name, buffer in model.named_buffers())
    return [(name, buffer) for name, buffer in named if name in persistent]


def _frozen(model: nn.Module) -> list[tuple[str, Any]]:
    return [(canonical_name(name), p) for name, p in model.named_parameters() if not p.requires_grad]


def _write_rest(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Those frozen parameters and persistent buffers of which there are flattened values."""
    for name, param in _frozen(model):
        if name not in values:
            continue
        with _gathered(param, write=True):
            if hasattr(param, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor

                whole = values[name].view(param.shape).to(param.device)
                param.copy_(distribute_tensor(whole, param.device_mesh, param.placements))
            else:
                param.copy_(values[name].view(param.shape))
    for name, buffer in _persistent_buffers(model):
        if name in values:
            buffer.copy_(values[name].view(buffer.shape))


def _gathered(param: Any, *, write: bool) -> AbstractContextManager[Any]:
    """Within it, a parameter that ZeRO-3 has partitioned is whole; what rank 0 writes is kept if `write`."""
    if not hasattr(param, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([param], modifier_rank=0 if write else None)
