"""Reading a checkpoint into a model and its optimizer."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer

from stacey_dist.checkpoint.manifest import MODEL_FILE, OPTIMIZER_FILE, DamagedCheckpointError, read_manifest, verify
from stacey_dist.checkpoint.write import model_tensors


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, *, verified: bool = False) -> dict[str, Any]:
    """Load weights, buffers and optimizer state in place, bit for bit; returns the manifest.

    The optimizer's settings (lr, ...) stay as they are: a checkpoint carries state, the configuration settings.

    Args:
        path: the checkpoint's directory.
        model: gets the weights and buffers; names, shapes and dtypes must be the checkpoint's.
        optimizer: gets the state of the model's parameters, replacing what it has.
        verified: the files' checksums were compared already.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or altered; or a tensor does not fit the model. The
            model and the optimizer are not touched then.
    """
    manifest = read_manifest(path) if verified else verify(path)
    parameters = dict(model.named_parameters())
    with (
        safe_open(path / MODEL_FILE, framework="pt") as weights,
        safe_open(path / OPTIMIZER_FILE, framework="pt") as state,
        torch.no_grad(),
    ):
        targets = model_tensors(model)
        saved = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        states = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        scalars: dict[str, Any] = manifest["optimizer"]["scalars"]
        for name in sorted(saved.keys() | targets.keys()):
            there, here = (_kind(tensors.get(name)) for tensors in (saved, targets))
            if there != here:
                raise DamagedCheckpointError(f"{path}: {name} is {there} there, and {here} here")
        for full_name in [*states, *scalars]:
            param = parameters.get(full_name.rsplit("/", 1)[0])
            value = states.get(full_name)
            fits = value is None or value.dim() == 0 or (param is not None and value.shape == param.shape)
            if param is None or not fits:
                raise DamagedCheckpointError(f"{path}: the state {full_name} does not fit a parameter here")
        for name, target in targets.items():
            target.copy_(saved[name])
        optimizer.state.clear()
        for full_name, value in states.items():
            name, key = full_name.rsplit("/", 1)
            param = parameters[name]
            # A step count stays on the CPU, where torch's optimizers keep it, unless they are fused for a GPU.
            on_cpu = key == "step" and not _fused(optimizer)
            optimizer.state[param][key] = value if on_cpu else value.to(param.device)
        for full_name, scalar in scalars.items():
            name, key = full_name.rsplit("/", 1)
            optimizer.state[parameters[name]][key] = scalar
    return manifest


def _kind(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _fused(optimizer: Optimizer) -> bool:
    """Whether the optimizer is one of torch's fused ones, which keep their step count on the device."""
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))
