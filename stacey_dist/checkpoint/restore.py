"""Restore a model and its optimizer from a checkpoint, independently of the engine.

`allocate` returns the tensors of this rank to read, a reader fills them, and `restore` completes them. Frozen
parameters and buffers, which every rank has in full, follow in batches.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stacey_dist.checkpoint.manifest import DamagedCheckpointError
from stacey_dist.checkpoint.model_tensors import Contents, Kind, check_names, describe, shapes
from stacey_dist.checkpoint.shard import Range
from stacey_dist.optim.base import ElementwiseOptimizer
from stacey_dist.sharding import base_optimizer, fragments
from stacey_dist.sharding.fragment import Fragment


@dataclass
class Allocated:
    """Tensors of this rank that are to be read, and what is to be done with them then.

    Attributes:
        ranges: what to read, by name, most of it directly into weights and states.
        reordered: pairs of tensors (target, flat). Checkpoints are row-major: a target in another memory order is read
            into `flat` and copied from there.
        steps: fragments, and the counts of their updates to read. An engine may count once for many parameters.
        unsaved: fragments and keys of states that are not in the checkpoint. Under ZeRO, a parameter without updates
            shares a flat tensor with parameters that have state.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    reordered: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    steps: list[tuple[Fragment, Tensor]] = field(default_factory=list)
    unsaved: list[tuple[Fragment, str]] = field(default_factory=list)

    def add(self, name: str, start: int, target: Tensor) -> None:
        """Have a tensor filled with the elements from `start` on."""
        flat = target.view(-1) if target.is_contiguous() else target.new_empty(target.numel())
        if not target.is_contiguous():
            self.reordered.append((target, flat))
        self.ranges[name] = Range(start, flat)


def check_fit(path: Path, contents: Contents, model: nn.Module, optimizer: Any) -> None:
    """Raise DamagedCheckpointError unless the tensors of the checkpoint at `path` can be restored into the model.

    Frozen parameters and buffers may have another dtype here; an engine's fp32 masters are compared where it has some.
    """
    check_names(model)
    dtypes = {f"model/{f.name}": describe(f.shape, f.weight.dtype)[1] for f in fragments(model, optimizer)}
    here = {f"model/{name}": shape for name, shape in shapes(model).items()}
    there = {name: kind for name, kind in contents.items() if name.startswith("model/")}
    for name in sorted(here.keys() | there.keys()):
        short, saved = name.removeprefix("model/"), there.get(name)
        dtype = dtypes.get(name, saved[1] if saved else "")
        if saved is None or name not in here or saved != (here[name], dtype):
            ours = f"{here[name]} {dtype}" if name in here else "absent"
            theirs = f"{saved[0]} {saved[1]}" if saved else "absent"
            raise DamagedCheckpointError(f"{path}: {short} is {theirs} in the checkpoint, but {ours} in the model")
    states = _states(contents)
    for name, state in states.items():
        for key, (shape, _) in state.items():
            if f"model/{name}" not in here or (key != "step" and shape != here[f"model/{name}"]):
                raise DamagedCheckpointError(f"{path}: the state {name}/{key} does not fit a parameter of the model")
    keys = set().union(*states.values()) - {"step"}
    expected = set(getattr(base_optimizer(optimizer), "state_names", keys))
    if keys and keys != expected:
        saved_keys, own_keys = (", ".join(sorted(names)) for names in (keys, expected))
        raise DamagedCheckpointError(
            f"{path}: the optimizer's state is {saved_keys} in the checkpoint, but {own_keys} in this optimizer"
        )


def _states(contents: Contents) -> dict[str, dict[str, Kind]]:
    """Return the shape and dtype of each parameter's states, by the parameter's name and the state's key."""
    states: dict[str, dict[str, Kind]] = {}
    for full_name, kind in contents.items():
        name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
        if full_name.startswith("optimizer/"):
            states.setdefault(name, {})[key] = kind
    return states


@torch.no_grad()
def allocate(contents: Contents, model: nn.Module, optimizer: Any) -> Allocated:
    """Replace the optimizer's state with empty tensors for the saved state. Return what this rank has to read.

    The tensors that were saved, `contents`, must have passed `check_fit`.
    """
    base = base_optimizer(optimizer)
    base.state.clear()
    if isinstance(base, ElementwiseOptimizer):
        base.forget_counted()
    groups = _groups(base)
    saved = _states(contents)
    for f in fragments(model, optimizer, empty=True):
        for key, (_, dtype) in saved.get(f.name, {}).items():
            _allocate_state(base, groups.get(f.owner, base.param_groups[0]), f, key, getattr(torch, dtype))
    allocated = Allocated()
    for f in fragments(model, optimizer, empty=True):  # now with views of the state
        allocated.add(f"model/{f.name}", f.start, f.weight)
        for key, target in f.state.items():
            if key in saved.get(f.name, {}):
                allocated.add(f"optimizer/{f.name}/{key}", f.start, target)
            else:
                allocated.unsaved.append((f, key))
        if f.step is not None and "step" in saved.get(f.name, {}):
            allocated.steps.append((f, torch.empty((), dtype=f.step.dtype, device="cpu")))
            allocated.add(f"optimizer/{f.name}/step", 0, allocated.steps[-1][1])
    return allocated


def _allocate_state(base: Any, group: dict[str, Any], f: Fragment, key: str, dtype: torch.dtype) -> None:
    state = base.state[f.owner]
    if key == "step":
        ours = isinstance(base, ElementwiseOptimizer)
        on_device = group.get("capturable") or (group.get("fused") and not ours)
        own = torch.int64 if ours else torch.float32  # its own, whatever was saved
        state[key] = torch.zeros((), dtype=own, device=f.owner.device if on_device else "cpu")
    elif key not in state:  # fragments may share their owner
        state[key] = torch.zeros_like(f.owner, dtype=dtype, requires_grad=False)


def _groups(base: Any) -> dict[Tensor, dict[str, Any]]:
    """Return the group of each parameter. ZeRO-3's groups are empty between steps; its first one stands for them."""
    return {param: group for group in base.param_groups for param in group["params"]}


@torch.no_grad()
def restore(allocated: Allocated, optimizer: Any) -> None:
    """Complete weights and states whose ranges were read: restore the order in memory, and begin states not saved."""
    for target, values in allocated.reordered:
        target.copy_(values.view(target.shape))
    _restore_steps(allocated.steps)
    base = base_optimizer(optimizer)
    if isinstance(base, ElementwiseOptimizer):  # states of torch's optimizers begin as zeros
        groups = _groups(base)
        for f, key in allocated.unsaved:
            dtype = str(f.state[key].dtype).removeprefix("torch.")
            group = groups.get(f.owner, base.param_groups[0]) | {"state_dtype": dtype}
            f.state[key].copy_(base.initial_state(f.weight, group)[key])


def _restore_steps(steps: list[tuple[Fragment, Tensor]]) -> None:
    """Write each count where its fragments' owner has it: the largest, if an engine counts once for many parameters."""
    by_owner: dict[Tensor, list[tuple[Fragment, Tensor]]] = {}
    for f, step in steps:
        by_owner.setdefault(f.owner, []).append((f, step))
    for counted in by_owner.values():
        (least, fewest), (most, largest) = (choose(counted, key=lambda one: one[1].item()) for choose in (min, max))
        if not torch.equal(fewest, largest):
            warnings.warn(
                f"{least.name} had {fewest.item():.0f} updates and {most.name} {largest.item():.0f}, but this engine "
                f"counts them together: they continue with {largest.item():.0f}",
                stacklevel=2,
            )
        for f, _ in counted:
            assert f.step is not None
            f.step.copy_(largest)
