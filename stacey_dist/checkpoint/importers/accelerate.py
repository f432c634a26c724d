"""What `Accelerator.save_state` makes on one process, DDP and FSDP2."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stacey_dist.checkpoint.importers.distributed import read_tensors
from stacey_dist.checkpoint.importers.foreign import (
    ForeignCheckpointError,
    Imported,
    check_parameters,
    load,
    one_line,
)
from stacey_dist.files import check_regular
from stacey_dist.sharding.fragment import canonical_name

T = TypeVar("T")


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
    weights, states = (_renamed(found, canonical_name) for found in (weights, states))
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
            check_regular(file)
            weights |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ForeignCheckpointError(f"{file}: {one_line(error)}") from error
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


def _renamed(values: dict[str, T], rename: Callable[[str], str]) -> dict[str, T]:
    """By other names. Raises ForeignCheckpointError where two have one name then."""
    renamed = {rename(name): value for name, value in values.items()}
    if len(renamed) != len(values):
        raise ForeignCheckpointError(f"two of its tensors would have one name: {', '.join(sorted(values)[:6])}, ...")
    return renamed


def _stripped(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return _renamed(tensors, lambda name: name.removeprefix(prefix))


def _by_parameter(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in _stripped(tensors, "optimizer.").items():
        if full_name.startswith("state."):
            name, _, key = full_name.removeprefix("state.").rpartition(".")
            states.setdefault(name, {})[key] = tensor
    return states


def _distributed(directory: Path) -> dict[str, Tensor]:
    """The tensors that torch.distributed.checkpoint saved, as wholes. Raises ForeignCheckpointError."""
    try:
        return read_tensors(directory)
    except Exception as error:  # of many kinds, for files cut short, altered or missing
        named = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        raise ForeignCheckpointError(f"{directory}: {one_line(error)}{named}") from error
