"""Reading a checkpoint into a model and its optimizer."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer

from stacey_dist.checkpoint.manifest import MODEL_FILE, OPTIMIZER_FILE, DamagedCheckpointError, verify
from stacey_dist.checkpoint.write import model_tensors


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load weights, buffers and optimizer state in place, bit for bit; returns the manifest.

    The optimizer's settings (lr, ...) stay as they are: a checkpoint carries state, the configuration settings.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or altered; or a tensor does not fit the model. The
            model and the optimizer are not touched then.
    """
    manifest = verify(path)
    parameters = dict(model.named_parameters())
    with (
        safe_open(path / MODEL_FILE, framework="pt") as weights,
        safe_open(path / OPTIMIZER_FILE, framework="pt") as state,
        torch.no_grad(),
    ):
        targets = model_tensors(model)
        saved = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        expected = {name: tuple(tensor.shape) for name, tensor in targets.items()}
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                raise DamagedCheckpointError(
                    f"{path}: {name} has shape {saved.get(name, 'none')} there, and {expected.get(name, 'none')} here"
                )
        for name, target in targets.items():
            target.copy_(weights.get_tensor(name))
        optimizer.state.clear()
        for full_name in state.keys():  # noqa: SIM118
            name, key = full_name.rsplit("/", 1)
            param = parameters[name]
            value = state.get_tensor(full_name)
            # A step count stays on the CPU, where torch's optimizers keep it, unless they are fused for a GPU.
            on_cpu = key == "step" and not _fused(optimizer)
            optimizer.state[param][key] = value if on_cpu else value.to(param.device)
        for full_name, scalar in manifest["optimizer"]["scalars"].items():
            name, key = full_name.rsplit("/", 1)
            optimizer.state[parameters[name]][key] = scalar
    return manifest


def _fused(optimizer: Optimizer) -> bool:
    """Whether the optimizer is one of torch's fused ones, which keep their step count on the device."""
    return isinstance(optimizer, torch.optim.Adam) and bool(optimizer.defaults.get("fused"))
