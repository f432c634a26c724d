"""Read what `Accelerator.save_state` makes on one process, DDP and FSDP2."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stacey_dist.checkpoint.importers.distributed import read_tensors
from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError, Imported, load, reading, renamed
from stacey_dist.files import check_regular


def read(source: Path) -> Imported:
    """Read whichever of its layouts is there. Raises ForeignCheckpointError."""
    if (source / "optimizer_0").is_dir():
        weights = _distributed(source / "pytorch_model_fsdp_0", "model.")
        states: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in _distributed(source / "optimizer_0", "optimizer.").items():
            name, _, key = full_name.removeprefix("state.").rpartition(".")
            if full_name.startswith("state."):
                states.setdefault(name, {})[key] = tensor
        return Imported("Accelerate, FSDP2", _untied(weights, states), states)
    if not (source / "optimizer.bin").is_file():
        raise ForeignCheckpointError(
            f"{source}: it is not what Accelerator.save_state or DeepSpeed saved (there is no optimizer.bin, "
            "no optimizer_0 and no *_optim_states.pt)"
        )
    optimizer = load(source / "optimizer.bin")
    if (source / "pytorch_model_fsdp.bin").is_file():
        states = {name: dict(state) for name, state in optimizer["state"].items()}
        return Imported("Accelerate, FSDP2", _untied(load(source / "pytorch_model_fsdp.bin"), states), states)
    groups = [
        [dict(optimizer["state"].get(index, {})) for index in group["params"]] for group in optimizer["param_groups"]
    ]
    return Imported("Accelerate, one process or DDP", _weights(source), groups=groups)


def _distributed(directory: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors that torch.distributed.checkpoint saved, by names without a prefix."""
    with reading(directory):
        tensors = read_tensors(directory)
    return renamed(directory, tensors, lambda name: name.removeprefix(prefix))


def _untied(weights: dict[str, Tensor], states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Leave out the other end of a tie: a matrix without state that equals one with state."""
    with_state = [weights[name] for name in states if name in weights]

    def is_tied(name: str, tensor: Tensor) -> bool:
        alike = (other for other in with_state if other.shape == tensor.shape)
        return name not in states and tensor.dim() > 1 and any(torch.equal(other, tensor) for other in alike)

    return {name: tensor for name, tensor in weights.items() if not is_tied(name, tensor)}


def _weights(source: Path) -> dict[str, Tensor]:
    """Read the model, in one file or several."""
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("model*.safetensors")):
        with reading(file):
            check_regular(file)
            weights |= load_file(file)
    if weights:
        return weights
    files = sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise ForeignCheckpointError(f"{source}: there is no model.safetensors and no pytorch_model.bin")
    return {name: tensor for file in files for name, tensor in load(file).items()}
