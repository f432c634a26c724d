"""Initial weights as functions of (seed, name, element), so that each process computes only its own shard.

A model is built on torch's meta device, without memory. Meanwhile the initialization of each parameter by its module is
recorded: a normal or uniform distribution, a constant, or given values. After an engine has sharded the model, each
process writes the elements that it holds, as it does when it loads a checkpoint. The float32 bits are the same on every
engine, number of processes and device.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from stacey_dist.sharding import fragments, refresh_weights
from stacey_dist.training.counter_random import normal, uniform
from stacey_dist.training.processes.launch import compute_dtype, loads_weights_from_rank0, shards_weights
from stacey_dist.training.run import Run

M = TypeVar("M", bound=nn.Module)
_CHUNK = {"cpu": 1 << 16}
"""Elements that are made at a time: what a CPU's caches hold; a GPU's many cores take more."""
_CHUNK_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class Write:
    """A write into elements [start, stop) of a parameter: `values`, or `offset` + `scale` x random numbers."""

    start: int
    stop: int
    random: Callable[..., Tensor] | None = None
    offset: float = 0.0
    scale: float = 0.0
    values: Tensor | None = None


@dataclass(frozen=True)
class InitialWeights:
    """The initial values of a model's parameters.

    Attributes:
        seed: of the run.
        writes: by a parameter's name, what is written into it, in order. The first is of the whole parameter.
    """

    seed: int
    writes: dict[str, list[Write]]

    @torch.no_grad()
    def fill(self, model: nn.Module, optimizer: Any, device: torch.device) -> None:
        """Write this process's elements on whichever engine the model is. All processes call it together.

        Args:
            model, optimizer: as `stacey_dist.sharding.fragments` takes them.
            device: makes the numbers, wherever the weights lie.
        """
        for part in fragments(model, optimizer):
            flat = part.weight.view(-1) if part.weight.is_contiguous() else torch.empty_like(part.weight).view(-1)
            size = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
            for start in range(part.start, part.stop, size):
                stop = min(start + size, part.stop)
                flat[start - part.start : stop - part.start].copy_(self.values(part.name, start, stop, device))
            if not part.weight.is_contiguous():
                part.weight.copy_(flat.view(part.weight.shape))
        refresh_weights(model, optimizer)

    def values(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Return elements [start, stop) of a parameter, counted row by row, in float32."""
        found = torch.empty(stop - start, device=device)
        for write in self.writes[name]:
            first, last = max(start, write.start), min(stop, write.stop)
            if first >= last:
                continue
            part = found[first - start : last - start]
            if write.values is not None:
                part.copy_(write.values[first - write.start : last - write.start])
            elif write.random is None:
                part.fill_(write.offset)
            else:
                numbers = write.random(f"{self.seed} {name}", first, last, device)
                part.copy_(numbers.mul_(write.scale).add_(write.offset))
        return found


class _HideMetaDevice(TorchFunctionMode):
    """Make `Tensor.is_meta` false, because some functions of torch.nn.init skip tensors on the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Moves parameters to the meta device as modules get them, and records what is written into them then.

    Buffers stay where they are: they have values of their own, and are small.

    Attributes:
        writes: what is written into tensors of the meta device, by their storage; None for what is not understood.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writes: dict[int, list[Write] | None] = {}
        self.alive: list[Tensor] = []  # keeps storages alive, so that no address is used again

    def __enter__(self) -> Any:
        self.register = register = nn.Module.register_parameter

        def register_without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(module, name, param)
            if param is not None and not _is_meta(param):
                move_without_values(param, torch.device("meta"))

        nn.Module.register_parameter = register_without_memory  # type: ignore
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        nn.Module.register_parameter = self.register  # type: ignore
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        for argument in function._schema.arguments:
            target = given.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(target, Tensor) and _is_meta(target):
                self._record(target, _write(function._schema.name, given, target))
        return result

    def _record(self, target: Tensor, write: Write | None) -> None:
        key = target.untyped_storage()._cdata
        if key not in self.writes:
            self.alive.append(target)
        before = self.writes.get(key, [])
        whole = write is not None and write.stop - write.start == _elements(target)
        if write is None or (before is None and not whole):
            self.writes[key] = None
        else:
            self.writes[key] = [write] if whole else [*(before or []), write]

    def of(self, param: nn.Parameter) -> list[Write] | None:
        """Return what makes up the whole parameter; None if that is not known."""
        writes = self.writes.get(param.untyped_storage()._cdata)
        known = writes and writes[0].stop - writes[0].start == param.numel() == _elements(param)
        return writes if known and param.requires_grad and param.is_contiguous() else None


def _write(operation: str, given: dict[str, Any], target: Tensor) -> Write | None:
    """Return what an operation writes into the range of its storage that a tensor is; None for an unknown operation."""
    start = int(target.storage_offset())
    place = start, start + target.numel()
    if not target.is_contiguous() or given.get("generator") is not None:
        return None
    match operation:
        case "aten::normal_":
            return Write(*place, normal, given.get("mean", 0.0), given.get("std", 1.0))
        case "aten::uniform_":
            low, high = given.get("from", 0.0), given.get("to", 1.0)
            return Write(*place, uniform, low, high - low)
        case "aten::zero_":
            return Write(*place)
        case "aten::fill_" if isinstance(given["value"], int | float):
            return Write(*place, offset=float(given["value"]))
        case "aten::copy_" if not _is_meta(given["src"]):
            return Write(*place, values=given["src"].expand(target.shape).flatten().clone())
    return None


def _is_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def make_model(run: Run[Any], build: Callable[[], M]) -> M:
    """Build a model whose initial weights are functions of (seed, name, element).

    `build` returns the model, on the CPU. Its parameters have no values, and on engines that shard them no memory; the
    engine writes the values. If a module's initialization is not recognized, the model is built with values from the
    seed: on rank 0 alone, if the engine sends the other ranks their shards.
    """
    accelerator, seed = run.accelerator, run.config.seed
    sent = False
    if (made := _build_without_values(seed, build)) is not None:
        model, initial = made
        if initial is not None:
            model.initial_weights = initial  # type: ignore[assignment]
            if not shards_weights(accelerator):
                allocate(model.parameters(), accelerator.device, compute_dtype(accelerator))
            return model
        sent = loads_weights_from_rank0(accelerator, model) and not accelerator.is_main_process
    torch.manual_seed(seed)
    with no_init_weights() if sent else nullcontext():
        return build()


def initial_weights(seed: int, build: Callable[[], nn.Module]) -> InitialWeights | None:
    """Return what the parameters of a model begin with; None if that is not known."""
    made = _build_without_values(seed, build)
    return None if made is None else made[1]


def _build_without_values(seed: int, build: Callable[[], M]) -> tuple[M, InitialWeights | None] | None:
    """Return a model whose parameters are on the meta device, and what they begin with, if that is known.

    None if its initialization looks at values.
    """
    torch.manual_seed(seed)  # of values that an initialization computes by itself
    try:
        with _HideMetaDevice(), _Recorder() as recorder:
            model = build()
    except RuntimeError:  # the initialization reads values, and tensors on the meta device have none
        return None
    writes = {name: recorder.of(param) for name, param in model.named_parameters()}
    known = {name: found for name, found in writes.items() if found}
    return model, InitialWeights(seed, known) if len(known) == len(writes) else None


def allocate(params: Iterable[nn.Parameter], device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Give parameters on the meta device memory, without values."""
    for param in params:
        if param.is_meta:
            move_without_values(param, device, dtype)


def move_without_values(param: nn.Parameter, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Move a parameter, which stays the same object: tied modules and the optimizer keep it."""
    there = nn.Parameter(torch.empty_like(param, device=device, dtype=dtype), param.requires_grad)
    there.__dict__.update(param.__dict__)
    torch.utils.swap_tensors(param, there)
