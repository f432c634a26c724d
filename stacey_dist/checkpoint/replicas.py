"""Compare the ranks that should hold the same weights and states, since each of them saves a part."""

import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stacey_dist.checkpoint.collectives import gather, rank0_call, together, world_size
from stacey_dist.checkpoint.model_tensors import bits, full_shape
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import fragments
from stacey_dist.sharding.fragment import Fragment, canonical_name

# Models are compared once: afterwards equal gradients keep them equal.
_compared: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# Elements summed at a time.
_CHUNK = 1 << 22
# Odd, so that a change of one element changes the sum, and large, so that changes of several do not cancel.
_FACTOR = 0x1E3779B97F4A7C15

# The name and a digest of each thing that a rank holds.
_Entries = list[tuple[str, str]]


def compare_once(model: nn.Module, optimizer: Any, group: Any = None) -> None:
    """Compare the ranks' replicas, at the first call for a model. All ranks call it together.

    The ranks must have parameters of the same names and shapes, and ranks that hold the same elements must have the
    same bits in trainable weights and optimizer states. Buffers and the values of frozen parameters may differ.
    Raises SettingsError on all ranks if they differ; it names the first parameter that does, and the ranks.
    """
    if world_size() == 1 or model in _compared:
        return
    replicated = together(lambda: [f for f in fragments(model, optimizer) if f.replicas > 1], group)
    _compare("is not the same parameter", "", together(lambda: _names(model), group), group)
    # Ranks of other shards hold other elements, and are not compared.
    held = _hash([(f.name, f"{f.start} {f.stop}") for f in replicated])
    _compare("has other values", held, together(lambda: list(_values(replicated)), group), group)
    _compared.add(model)


def _compare(what: str, held: str, mine: _Entries, group: Any) -> None:
    """Raise SettingsError if ranks with equal `held` have different entries. Only then, all entries are gathered.

    `what` says what is wrong with an entry that differs.
    """
    digests = gather((held, _hash(mine)), group)
    if ranks := rank0_call(lambda: _differing(digests), group):
        everyone = gather(mine, group)
        raise SettingsError(rank0_call(lambda: _difference(what, {rank: everyone[rank] for rank in ranks}), group))


def _differing(digests: list[tuple[str, str]]) -> list[int]:
    """Return the first ranks that hold the same but have different entries; none if there are no such ranks."""
    by_held: dict[str, list[int]] = {}
    for rank, (held, _) in enumerate(digests):
        by_held.setdefault(held, []).append(rank)
    return next((ranks for ranks in by_held.values() if len({digests[rank] for rank in ranks}) > 1), [])


def _difference(what: str, entries: dict[int, _Entries]) -> str:
    """Return a message that names the first entry that differs, and the ranks that agree on it."""
    name = _first_difference(list(entries.values()))
    by_value: dict[str | None, list[int]] = {}
    for rank, own in entries.items():
        by_value.setdefault(dict(own).get(name), []).append(rank)
    shown = " and on ".join(_ranks(those) for those in by_value.values())
    return (
        f"{name} {what} on {shown}. The model counts as replicated there, so its ranks must agree: wrap it in "
        "DistributedDataParallel, which makes them equal, before the first update. Models that are split over ranks "
        "in another way (tensor, pipeline, expert parallel) are not supported"
    )


def _first_difference(entries: list[_Entries]) -> str:
    for row in zip(*entries, strict=False):
        if len(set(row)) > 1:
            return row[0][0]
    return max(entries, key=len)[min(map(len, entries))][0]  # equal as far as the shorter one goes


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _names(model: nn.Module) -> _Entries:
    return [
        (canonical_name(name), f"{tuple(full_shape(param))} {param.requires_grad}")
        for name, param in model.named_parameters()
    ]


def _values(replicated: list[Fragment]) -> Iterator[tuple[str, str]]:
    for f in replicated:
        state = {f"optimizer/{f.name}/{key}": f.state[key] for key in sorted(f.state)}
        for name, tensor in ({f"model/{f.name}": f.weight} | state).items():
            yield name, f"{tensor.dtype} {_checksum(tensor)}"
        yield f"optimizer/{f.name}/step", str(None if f.step is None else float(f.step))


def _hash(entries: _Entries) -> str:
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def _checksum(values: Tensor) -> int:
    """Return the sum of each element's bits times a number made of its position, modulo 2^64, on any device."""
    flat = bits(values)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=flat.device)
        total += ((position * _FACTOR * 2 + 1) * chunk).sum()
    return int(total.item())
