"""Read what `Accelerator.save_state` makes on one process, DDP and FSDP2."""

import re
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stacey_dist.checkpoint.importers.distributed import read_tensors
from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError, Imported, load, reading, renamed
from stacey_dist.files import check_regular
from stacey_dist.sharding.fragment import canonical_name

# A model in one file or several, and what a second model or optimizer is saved as.
_MODEL = re.compile(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin")
_ANOTHER = re.compile(r"(model|pytorch_model|pytorch_model_fsdp|optimizer)_[1-9]\d*(\..*)?")


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
    maker, weights = "Accelerate, one process or DDP", _weights(source)
    groups = [
        [dict(optimizer["state"].get(index, {})) for index in group["params"]] for group in optimizer["param_groups"]
    ]
    names = [list(group.get("param_names") or ()) for group in optimizer["param_groups"]]
    if not _are_names(names, groups, weights):
        return Imported(maker, weights, groups=groups)
    states = dict(zip(chain(*names), chain(*groups), strict=True))
    states = {name: state for name, state in states.items() if state}
    return Imported(maker, _untied(weights, states), states)


def check_single(source: Path) -> None:
    """Raise ForeignCheckpointError if several models or optimizers were saved: which of them belong together?"""
    others = sorted(file.name for file in source.glob("*_*") if _ANOTHER.fullmatch(file.name))
    if others:
        raise ForeignCheckpointError(
            f"{source}: it holds several models or optimizers ({', '.join(others[:4])}); import a copy of it that has "
            "only the trained model and its optimizer, under the names of the first"
        )


def _are_names(names: list[list[str]], groups: list[list[dict[str, Tensor]]], weights: dict[str, Tensor]) -> bool:
    """Return whether the optimizer knows its parameters' names, which are those of weights."""
    known = {canonical_name(name) for name in weights}
    every = [canonical_name(name) for group in names for name in group]
    return [len(group) for group in names] == [len(group) for group in groups] and known.issuperset(every)


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
    files = [file for file in sorted(source.iterdir()) if _MODEL.fullmatch(file.name)]
    files = [file for file in files if file.suffix == ".safetensors"] or files
    if not files:
        raise ForeignCheckpointError(f"{source}: there is no model.safetensors and no pytorch_model.bin")
    for file in files:
        with reading(file):
            check_regular(file)
            part = load_file(file) if file.suffix == ".safetensors" else load(file)
        if twice := weights.keys() & part.keys():
            raise ForeignCheckpointError(f"{file}: {min(twice)} is in an earlier file, too")
        weights |= part
    return weights
