"""What `Accelerator.save_state` makes on one process, DDP and FSDP2."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from stacey_dist.checkpoint.importers.foreign import (
    ForeignCheckpointError,
    Imported,
    MetadataUnpickler,
    check_parameters,
    load,
)
from stacey_dist.sharding.fragment import canonical_name


def read(source: Path, parameters: Sequence[Sequence[str]] | None) -> Imported:
    """Whichever of its layouts is there. Raises ForeignCheckpointError."""
    if (source / "optimizer_0").is_dir():
        model, optimizer = (_distributed(source / name) for name in ("pytorch_model_fsdp_0", "optimizer_0"))
        return _named("Accelerate, FSDP2", _stripped(model, "model."), _by_parameter(optimizer), parameters)
    if not (source / "optimizer.bin").is_file():
        raise ForeignCheckpointError(
            f"{source}: it is not what Accelerator.save_state or DeepSpeed saved (there is no optimizer.bin, "
            "no optimizer_0 and no *_optim_states.pt)"
        )
    optimizer = load(source / "optimizer.bin")
    if (source / "pytorch_model_fsdp.bin").is_file():
        weights = load(source / "pytorch_model_fsdp.bin")
        states = {name: dict(state) for name, state in optimizer["state"].items()}
        return _named("Accelerate, FSDP2", weights, states, parameters)
    if parameters is None:
        raise ForeignCheckpointError(
            f"{source / 'optimizer.bin'}: it has no names; say which model it is of, for the order of its parameters"
        )
    weights = _weights(source)
    order = [next((name for name in names if name in weights), names[0]) for names in parameters]
    first = {found: names[0] for found, names in zip(order, parameters, strict=True)}
    aliases = {name for names in parameters for name in names} - first.keys()
    weights = {first.get(name, name): tensor for name, tensor in weights.items() if name not in aliases}
    check_parameters(source, weights, parameters)  # what the states are assigned to
    names = [names[0] for names in parameters]
    states = _assigned(optimizer, names, weights, source / "optimizer.bin")
    return Imported("Accelerate, one process or DDP", weights, states)


def _named(
    maker: str,
    weights: dict[str, Tensor],
    states: dict[str, dict[str, Tensor]],
    parameters: Sequence[Sequence[str]] | None,
) -> Imported:
    """Without what wrappers add to names, and with a tied parameter under its first name alone."""
    weights = {canonical_name(name): tensor for name, tensor in weights.items()}
    states = {canonical_name(name): state for name, state in states.items()}
    for names in parameters or []:
        for alias in names[1:]:
            weights.pop(alias, None)
    # A matrix without state that equals one with state: the other end of a tie.
    with_state = [weights[name] for name in states if name in weights]
    for name in [name for name in weights if name not in states]:
        tensor = weights[name]
        if tensor.dim() > 1 and any(t.shape == tensor.shape and torch.equal(t, tensor) for t in with_state):
            del weights[name]
    return Imported(maker, weights, states)


def _weights(source: Path) -> dict[str, Tensor]:
    """The model, in one file or several."""
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("model*.safetensors")):
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ForeignCheckpointError(f"{file}: {error}") from error
    if weights:
        return weights
    files = sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise ForeignCheckpointError(f"{source}: there is no model.safetensors and no pytorch_model.bin")
    return {name: tensor for file in files for name, tensor in load(file).items()}


def _assigned(
    optimizer: dict[str, Any], names: list[str], weights: dict[str, Tensor], file: Path
) -> dict[str, dict[str, Tensor]]:
    """Which state is whose: each group has its parameters in the model's order, and the shapes have to fit.

    Raises ForeignCheckpointError if they fit in no way, or in several.
    """
    groups = [list(group["params"]) for group in optimizer["param_groups"]]
    if sum(map(len, groups)) != len(names):
        raise ForeignCheckpointError(
            f"{file}: it is of {sum(map(len, groups))} parameters, but the model has {len(names)} trainable ones"
        )
    state = optimizer["state"]

    def fits(name: str, index: int) -> bool:
        shapes = {t.shape for key, t in state.get(index, {}).items() if key != "step" and isinstance(t, Tensor)}
        return shapes <= {weights[name].shape}

    # Ways to have given the first parameters to the groups, by how many each group has got; two are too many.
    ways: dict[tuple[int, ...], list[tuple[int, ...]]] = {(0,) * len(groups): [()]}
    for name in names:
        further: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for counts, chosen in ways.items():
            for number, group in enumerate(groups):
                if counts[number] < len(group) and fits(name, group[counts[number]]):
                    after = (*counts[:number], counts[number] + 1, *counts[number + 1 :])
                    known = further.setdefault(after, [])
                    known += [(*way, number) for way in chosen][: 2 - len(known)]
        ways = further
    solutions = [way for chosen in ways.values() for way in chosen]
    if len(solutions) != 1:
        many = "several ways" if solutions else "no way"
        raise ForeignCheckpointError(f"{file}: the shapes of its states fit the model's parameters in {many}")
    positions = [0] * len(groups)
    states = {}
    for name, number in zip(names, solutions[0], strict=True):
        index = groups[number][positions[number]]
        positions[number] += 1
        if index in state:
            states[name] = dict(state[index])
    return states


def _stripped(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _by_parameter(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in _stripped(tensors, "optimizer.").items():
        if full_name.startswith("state."):
            name, _, key = full_name.removeprefix("state.").rpartition(".")
            states.setdefault(name, {})[key] = tensor
    return states


class _Reader(FileSystemReader):
    """torch's reader, but for the unpickling of what describes the files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as opened:
            metadata: Metadata = MetadataUnpickler(opened).load()
        return metadata


def _distributed(directory: Path) -> dict[str, Tensor]:
    """The tensors that torch.distributed.checkpoint saved, as wholes."""
    reader = _Reader(str(directory))
    try:
        kinds = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(kind.size, dtype=kind.properties.dtype)
            for name, kind in kinds.items()
            if isinstance(kind, TensorStorageMetadata)
        }
        with warnings.catch_warnings():  # this process means to work by itself
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_distributed(dict(tensors), storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as raised:  # of many kinds, for files cut short, altered or missing
        error: Any = raised
        if isinstance(raised, CheckpointException):
            ((error, _),) = raised.failures.values()
        raise ForeignCheckpointError(f"{directory}: {type(error).__name__}: {error}") from error
    return tensors
