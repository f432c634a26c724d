"""Messages of the ranks to rank 0 about the files they have written: a few bytes each for any number of tensors.

Each rank sends a record of fixed length: size and checksum of its file. A tensor's shape and dtype are sent by the rank
that has written its beginning, and only if rank 0 has not seen them before. Ranges are not sent. Rank 0 checks that the
ranges cover each tensor exactly once with sums that each rank computes:

    sum over ranges of (h(stop) - h(start))  =  h(number of elements) - h(0)    modulo 2^64

where h is a hash of the tensor and the position. Terms of adjacent ranges cancel. A gap or an overlap leaves hashes of
positions, which sum to 0 with a probability of 2^-64.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stacey_dist.checkpoint.collectives import (
    cpu_group,
    first_result,
    gather_bytes,
    rank,
    rank0_call,
    receive_bytes,
    send_bytes,
    world_size,
)
from stacey_dist.checkpoint.manifest import TensorEntries
from stacey_dist.checkpoint.model_tensors import Contents
from stacey_dist.checkpoint.shard import shard_name
from stacey_dist.checkpoint.snapshot import Snapshot

# Bytes and SHA-256 of the file, finite (-1: not known), the sum; digest and length of the tensors' description.
_RECORD = struct.Struct("<Q32sbQ16sQ")
_NOTHING = bytes(16)
_MODULUS = 1 << 64


@dataclass(frozen=True)
class Share:
    """The tensors and the file that one rank has written.

    Attributes:
        size: the bytes of its file; 0 if it has written none.
        sha256: of its file, in hexadecimal.
        finite: whether all that is trained is finite; None if nothing in it is known to be trained.
        edges: the sum over its ranges.
        tensors: shape and dtype of the tensors whose beginning it has written, as JSON.
    """

    size: int
    sha256: str
    finite: bool | None
    edges: int
    tensors: bytes

    def record(self) -> bytes:
        """Return the bytes that are sent in every save."""
        finite = -1 if self.finite is None else int(self.finite)
        sha256, digest = bytes.fromhex(self.sha256), _digest(self.tensors)
        return _RECORD.pack(self.size, sha256, finite, self.edges, digest, len(self.tensors))


@dataclass(frozen=True)
class Described:
    """Tensors that one rank has begun, as rank 0 keeps them for the next save.

    Attributes:
        contents: their shapes and dtypes.
        edges: the sum over them as wholes.
    """

    contents: Contents
    edges: int

    @classmethod
    def of(cls, tensors: bytes) -> "Described":
        """Return what `Share.tensors` describes."""
        contents = {name: (tuple(shape), dtype) for name, (shape, dtype) in json.loads(tensors).items()}
        return cls(contents, sum(_whole(name, kind) for name, kind in contents.items()))


def share(copies: Snapshot, file: Mapping[str, Any] | None, finite: bool | None) -> Share:
    """Return the share of a rank that has written a snapshot to a file of this size and SHA-256."""
    begun = _begun(copies)
    tensors = json.dumps(begun, separators=(",", ":")).encode() if begun else b""
    edges = sum(edges_by_name(copies).values()) % _MODULUS
    return Share(file["bytes"] if file else 0, file["sha256"] if file else "00" * 32, finite, edges, tensors)


def _begun(copies: Snapshot) -> Contents:
    """Return the tensors whose beginning a rank has written."""
    ranges = copies.ranges  # without a range: it has no elements
    return {name: kind for name, kind in copies.contents.items() if name not in ranges or ranges[name].start == 0}


def edges_by_name(copies: Snapshot) -> dict[str, int]:
    """Return the summand of each range that a rank has written."""
    return {name: _edges(name, copies.contents[name], part.start, part.stop) for name, part in copies.ranges.items()}


def _edges(name: str, kind: tuple[tuple[int, ...], str], start: int, stop: int) -> int:
    tensor = f"{name} {kind[0]} {kind[1]}"
    return _hash(f"{tensor} {stop}") - _hash(f"{tensor} {start}") if start < stop else 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _digest(tensors: bytes) -> bytes:
    return hashlib.blake2b(tensors, digest_size=16).digest() if tensors else _NOTHING


class Ledger:
    """The shares of all ranks in a save, as rank 0 knows them. One ledger serves all saves of a run.

    Attributes:
        files: size and SHA-256 of the files, by name.
        contents: the shape and dtype of every tensor, by name.
        finite: as in `Share`.
    """

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}
        self.contents: dict[str, tuple[tuple[int, ...], str]] = {}
        self.finite: bool | None = None
        self._known: dict[bytes, Described] = {}
        self._entries: TensorEntries | None = None

    def entries(self) -> TensorEntries:
        """Return the tensors as the manifest has them. Raises ValueError if they could not be read again."""
        if self._entries is None:
            self._entries = TensorEntries.of(self.contents)
        return self._entries

    def collect(self, mine: Share, copies: Snapshot, group: Any = None) -> None:
        """Collect the shares of all ranks. All ranks call it together, each with its own share and snapshot.

        Raises RuntimeError unless every element was written exactly once: this detects engines that shard unexpectedly.
        """
        records = gather_bytes(mine.record(), group)
        wanted = rank0_call(lambda: self.unknown(records), group)
        tensors = {0: mine.tensors}
        for sender, length in wanted:
            if rank() == 0 != sender:
                tensors[sender] = receive_bytes(length, sender, group)
            elif rank() == sender != 0:
                send_bytes(mine.tensors, group)
        if not rank0_call(lambda: self.combine(records, tensors), group):
            raise RuntimeError(self._first_gap(copies, group))

    def unknown(self, records: list[bytes]) -> list[tuple[int, int]]:
        """Return the ranks whose tensors rank 0 has not seen before, with the lengths of their descriptions."""
        found = ((sender, *_RECORD.unpack(record)[-2:]) for sender, record in enumerate(records))
        return [(sender, length) for sender, digest, length in found if length and digest not in self._known]

    def combine(self, records: list[bytes], tensors: dict[int, bytes]) -> bool:
        """Take the records of all ranks, and those descriptions that are new; return whether they are complete."""
        new = {digest: Described.of(text) for text in tensors.values() if (digest := _digest(text)) != _NOTHING}
        before, seen, self._known, self.files = self._known, self._known | new, {}, {}
        edges, begun, known_finite = 0, 0, []
        for writer, record in enumerate(records):
            size, sha256, finite, sum_of_ranges, digest, length = _RECORD.unpack(record)
            if size:
                self.files[shard_name(writer)] = {"bytes": size, "sha256": sha256.hex()}
            if length:
                self._known[digest] = seen[digest]
                begun += len(seen[digest].contents)
            if finite >= 0:
                known_finite.append(bool(finite))
            edges += sum_of_ranges
        self.finite = all(known_finite) if known_finite else None
        if self._known.keys() != before.keys():
            self.contents = {name: kind for one in self._known.values() for name, kind in one.contents.items()}
            self._entries = None
        edges -= sum(one.edges for one in self._known.values())
        return edges % _MODULUS == 0 and begun == len(self.contents)  # each begun once, too

    def _first_gap(self, copies: Snapshot, group: Any) -> str:
        """Return what is wrong with the first tensor that is not complete, by name. All ranks call it together."""
        mine = edges_by_name(copies)
        wholes = rank0_call(lambda: {name: _whole(name, kind) for name, kind in sorted(self.contents.items())}, group)
        headless = first_result(lambda: next((name for name in mine if name not in wholes), None), group)
        if headless is not None:
            return f"{headless}: its first elements were written by no rank"
        begun = _begun(copies)
        sums = torch.tensor([(_signed(mine.get(name, 0)), int(name in begun)) for name in wholes], device="cpu")
        if world_size() > 1:
            dist.all_reduce(sums, group=cpu_group(group))
        sums -= torch.tensor([(_signed(whole), 1) for whole in wholes.values()], device="cpu")
        name, (left, _) = next((name, each) for name, each in zip(wholes, sums.tolist(), strict=True) if any(each))
        if left:
            return f"{name}: some of its elements were written by no rank, or by two"
        return f"{name}: it was begun by two ranks, of which one has none of its elements"


def _whole(name: str, kind: tuple[tuple[int, ...], str]) -> int:
    return _edges(name, kind, 0, math.prod(kind[0]))


def _signed(value: int) -> int:
    """Return a number modulo 2^64 as an int64."""
    return (value + (_MODULUS >> 1)) % _MODULUS - (_MODULUS >> 1)
