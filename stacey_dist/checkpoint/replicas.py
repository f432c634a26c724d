"""Whether ranks that are taken to hold the same weights and states do: what is saved is put together from all."""

import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stacey_dist.checkpoint.collectives import all_gather_call, world_size
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import fragments
from stacey_dist.sharding.fragment import Fragment, canonical_name

# The models that were compared, each once: later, the same gradients keep them equal.
_compared: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# Elements that are summed at a time.
_CHUNK = 1 << 22
# Odd, so that a change of one element changes the sum, and large, so that changes of several do not cancel.
_FACTOR = 0x1E3779B97F4A7C15

# What a rank holds: what it is called, and a digest of it.
_Entries = list[tuple[str, str]]


def compare_once(model: nn.Module, optimizer: Any, group: Any = None) -> None:
    """Compare the ranks' replicas, at the first call for a model. All ranks call it together.

    The ranks must have parameters of the same names and shapes, and ranks that hold the same elements must have the
    same bits in trainable weights and optimizer states. Buffers and the values of frozen parameters may differ.

    Args:
        model: the model on its engine.
        optimizer: its optimizer on its engine.
        group: the process group that the ranks talk over.

    Raises:
        SettingsError: they differ; the message names the first parameter that does, and the ranks. The same on all.
    """
    if world_size() == 1 or model in _compared:
        return
    names: _Entries = []
    values: _Entries = []
    replicated: list[Fragment] = []

    def digest_of_names() -> tuple[str, str]:
        replicated.extend(f for f in fragments(model, optimizer) if f.replicas > 1)
        names.extend(_names(model))
        return "", _digest_of(names)

    def digest_of_values() -> tuple[str, str]:
        values.extend(_values(replicated))
        # Ranks of other shards hold other elements, and are not compared.
        return _digest_of([(f.name, f"{f.start} {f.stop}") for f in replicated]), _digest_of(values)

    _refuse_difference("is not the same parameter", all_gather_call(digest_of_names, group), names, group)
    _refuse_difference("has other values", all_gather_call(digest_of_values, group), values, group)
    _compared.add(model)


def _refuse_difference(what: str, digests: list[tuple[str, str]], mine: _Entries, group: Any) -> None:
    """Raise SettingsError if ranks that hold the same have other digests; only then everything is gathered."""
    if len(set(digests)) == len({held for held, _ in digests}):
        return
    everyone: list[_Entries] = all_gather_call(lambda: mine, group)
    first = next(rank for rank, (held, digest) in enumerate(digests) if digest != _first_of(digests, held)[1])
    held = digests[first][0]
    ranks = [rank for rank, (other, _) in enumerate(digests) if other == held]
    name = _first_difference([everyone[rank] for rank in ranks])
    by_value: dict[str | None, list[int]] = {}
    for rank in ranks:
        by_value.setdefault(dict(everyone[rank]).get(name), []).append(rank)
    shown = " and on ".join(_ranks(those) for those in by_value.values())
    raise SettingsError(
        f"{name} {what} on {shown}. The model counts as replicated there, so its ranks must agree: wrap it in "
        "DistributedDataParallel, which makes them equal, before the first update. Models that are split over ranks "
        "in another way (tensor, pipeline, expert parallel) are not supported"
    )


def _first_of(digests: list[tuple[str, str]], held: str) -> tuple[str, str]:
    return next(one for one in digests if one[0] == held)


def _first_difference(entries: list[_Entries]) -> str:
    for row in zip(*entries, strict=False):
        if len(set(row)) > 1:
            return row[0][0]
    return max(entries, key=len)[min(map(len, entries))][0]  # a rank has more than another


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _names(model: nn.Module) -> _Entries:
    return [
        (canonical_name(name), f"{tuple(getattr(param, 'ds_shape', param.shape))} {param.requires_grad}")
        for name, param in model.named_parameters()
    ]


def _values(replicated: list[Fragment]) -> Iterator[tuple[str, str]]:
    for f in replicated:
        state = {f"optimizer/{f.name}/{key}": f.state[key] for key in sorted(f.state)}
        for name, tensor in ({f"model/{f.name}": f.weight} | state).items():
            yield name, f"{tensor.dtype} {_digest(tensor)}"
        yield f"optimizer/{f.name}/step", str(None if f.step is None else float(f.step))


def _digest_of(entries: _Entries) -> str:
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def _digest(values: Tensor) -> int:
    """A sum of an element's bits times a number of its position, modulo 2^64: the same on any device."""
    whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = values.detach().reshape(-1).view(whole_numbers.get(values.element_size(), torch.uint8))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=flat.device)
        total += ((position * _FACTOR * 2 + 1) * chunk).sum()
    return int(total.item())
