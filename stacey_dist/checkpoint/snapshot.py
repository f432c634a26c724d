"""Copy this rank's share of a model and its optimizer to host memory, independently of the engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stacey_dist.checkpoint.collectives import rank, together, world_size
from stacey_dist.checkpoint.model_tensors import (
    Kind,
    check_names,
    describe,
    frozen_parameters,
    full_shape,
    gathered,
    persistent_buffers,
)
from stacey_dist.checkpoint.shard import Range
from stacey_dist.errors import SettingsError
from stacey_dist.optim.memory import full_tensor
from stacey_dist.sharding import base_optimizer, fragments
from stacey_dist.sharding.fragment import Fragment, trainable_parameters


@dataclass
class Snapshot:
    """One rank's share of a checkpoint, in host memory.

    Attributes:
        ranges: ranges of flattened tensors in host memory, by the tensors' names.
        contents: the shape and dtype of the whole tensors, by the same names.
        host_memory: flat buffers by name, reused if they fit, because allocating them costs more than the copy. New
            buffers are added.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    contents: dict[str, Kind] = field(default_factory=dict)
    host_memory: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Snapshot":
        """Return a snapshot of whole tensors in host memory, which are not copied."""
        return cls(
            {name: Range(0, tensor.contiguous().reshape(-1)) for name, tensor in tensors.items()},
            {name: describe(tensor.shape, tensor.dtype) for name, tensor in tensors.items()},
        )

    def add(
        self, name: str, values: Tensor, *, shape: torch.Size | None = None, start: int = 0, trained: bool = False
    ) -> None:
        """Copy values to host memory, without waiting for a GPU: a tensor's elements that begin at `start`.

        They may have any shape. `shape` is that of the whole tensor, by default that of `values`. `trained` is as in
        `Range`.
        """
        flat = values.detach().reshape(-1)
        memory = self.host_memory.get(name)
        if memory is None or (memory.numel(), memory.dtype) != (flat.numel(), flat.dtype):
            memory = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=flat.is_cuda)
            self.host_memory[name] = memory
        self.ranges[name] = Range(start, memory.copy_(flat, non_blocking=True), trained)
        self.contents[name] = describe(values.shape if shape is None else shape, flat.dtype)


def snapshot(
    model: nn.Module, optimizer: Any, host_memory: dict[str, Tensor] | None = None, group: Any = None
) -> Snapshot:
    """Copy the ranges that this rank writes to host memory.

    Each element of `model/NAME` (weights, fp32 masters where the engine has them; frozen parameters; persistent
    buffers) and `optimizer/NAME/KEY` (z, m, step, or another optimizer's state) is with exactly one rank.
    All ranks call it together, and all of them raise if one cannot copy. `host_memory` is that of `Snapshot`.
    """
    copies = Snapshot(host_memory={} if host_memory is None else host_memory)
    together(lambda: _add_trainable_parameters(copies, model, optimizer), group)
    errors = _add_frozen_parameters(copies, model)

    def finish() -> None:
        if errors:
            raise errors[0]
        if rank() == 0:  # buffers may differ between ranks, and belong together
            for name, buffer in persistent_buffers(model):
                copies.add(f"model/{name}", buffer)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    together(finish, group)
    return copies


def _add_trainable_parameters(copies: Snapshot, model: nn.Module, optimizer: Any) -> None:
    check_names(model)
    for fragment in fragments(model, optimizer):
        _refuse_unsaved_state(base_optimizer(optimizer), fragment)
        _add_fragment(copies, fragment)
    for name, param in trainable_parameters(model):
        if rank() == 0 and full_shape(param).numel() == 0:  # without a fragment, but a part of the model
            copies.add(f"model/{name}", torch.empty(full_shape(param), dtype=param.dtype, device="cpu"))


def _refuse_unsaved_state(base: Any, fragment: Fragment) -> None:
    for key, value in base.state.get(fragment.owner, {}).items():
        if value is not None and key != "step" and key not in fragment.state:
            kept = f"in the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"as a {type(value).__name__}"
            raise SettingsError(
                f"{type(base).__name__} keeps {key} of {fragment.name} {kept}; only tensors that are shaped as the "
                "parameter can be saved"
            )


def _add_fragment(copies: Snapshot, f: Fragment) -> None:
    """Add this rank's part of a fragment: ranks that hold the same fragment share the work."""
    count = f.stop - f.start
    first, last = (count * replica // f.replicas for replica in (f.replica, f.replica + 1))
    if first < last:
        state = {f"optimizer/{f.name}/{key}": value for key, value in f.state.items()}
        for name, tensor in ({f"model/{f.name}": f.weight} | state).items():
            part = tensor.reshape(-1)[first:last]
            copies.add(name, part, shape=f.shape, start=f.start + first, trained=True)
    if f.step is not None and f.start == 0 and f.replica == 0:
        # torch's own optimizers count in float32; an int64 is exact above 2^24, too.
        dtype = torch.float32 if f.step.is_floating_point() else torch.int64
        copies.add(f"optimizer/{f.name}/step", f.step.to(dtype), shape=torch.Size())


def _add_frozen_parameters(copies: Snapshot, model: nn.Module) -> list[Exception]:
    """Add every world_size-th frozen parameter. Each is whole on all ranks for a moment, one after another.

    Returns the errors of copies: all ranks make all the gathers, whatever fails.
    """
    errors: list[Exception] = []
    for turn, (name, param) in enumerate(frozen_parameters(model)):
        with gathered(param):
            whole = full_tensor(param)
            if turn % world_size() == rank():
                try:
                    copies.add(f"model/{name}", whole)
                except Exception as error:
                    errors.append(error)
    return errors
