"""What the ranks tell rank 0 about their files, and the check that these have every element exactly once.

A tensor's shape and dtype are sent by the rank that has written its beginning. Ranges are not sent. Rank 0 checks that
the ranges cover each tensor exactly once with sums that each rank computes:

    sum over ranges of (h(stop) - h(start))  =  h(number of elements) - h(0)    modulo 2^64

where h is a hash of the tensor and the position. Terms of adjacent ranges cancel. A gap or an overlap leaves hashes of
positions, which sum to 0 with a probability of 2^-64.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from stacey_dist.checkpoint.collectives import gather, rank0_call
from stacey_dist.checkpoint.model_tensors import Contents, Kind
from stacey_dist.checkpoint.snapshot import Snapshot

_MODULUS = 1 << 64


@dataclass(frozen=True)
class Share:
    """The tensors and the file that one rank has written.

    Attributes:
        file: the size and the SHA-256 of its file; None if it has written none.
        finite: whether all that is trained is finite; None if nothing in it is known to be trained.
        begun: shape and dtype of the tensors whose beginning it has written, by name.
        edges: the sum over its ranges.
    """

    file: dict[str, Any] | None
    finite: bool | None
    begun: Contents
    edges: int

    @classmethod
    def of(cls, copies: Snapshot, file: dict[str, Any] | None, finite: bool | None) -> "Share":
        """Return the share of a rank that has written a snapshot to a file of this size and SHA-256."""
        begun = {name: kind for name, kind in copies.contents.items() if copies.ranges[name].start == 0}
        return cls(file, finite, begun, sum(_edges_by_name(copies).values()) % _MODULUS)


def collect(mine: Share, copies: Snapshot, group: Any = None) -> list[Share]:
    """Return the shares of all ranks, by rank, on rank 0; an empty list on other ranks. All ranks call it together.

    Raises RuntimeError unless every element was written exactly once: this detects engines that shard unexpectedly.
    """
    shares = gather(mine, group)
    if not rank0_call(lambda: is_complete(shares), group):
        written = gather(_edges_by_name(copies), group)
        raise RuntimeError(rank0_call(lambda: _first_gap(shares, written), group))
    return shares


def contents(shares: list[Share]) -> dict[str, Kind]:
    """Return the shape and dtype of every tensor, by name."""
    return {name: kind for one in shares for name, kind in one.begun.items()}


def is_complete(shares: list[Share]) -> bool:
    """Return whether every element was written exactly once, and every tensor begun once."""
    tensors = contents(shares)
    left = sum(one.edges for one in shares) - sum(_whole(name, kind) for name, kind in tensors.items())
    return left % _MODULUS == 0 and sum(len(one.begun) for one in shares) == len(tensors)


def _first_gap(shares: list[Share], written: list[dict[str, int]]) -> str:
    """Return what is wrong with the first tensor that is not complete, by name, from the edges that each rank wrote."""
    tensors, times_begun = contents(shares), Counter(name for one in shares for name in one.begun)
    edges: Counter[str] = Counter()
    for one in written:
        edges.update(one)
    for name in sorted(edges.keys() | tensors.keys()):
        if name not in tensors:
            return f"{name}: its first elements were written by no rank"
        if (edges[name] - _whole(name, tensors[name])) % _MODULUS:
            return f"{name}: some of its elements were written by no rank, or by two"
        if times_begun[name] > 1:
            return f"{name}: it was begun by two ranks, of which one has none of its elements"
    raise AssertionError("every tensor is complete")


def _edges_by_name(copies: Snapshot) -> dict[str, int]:
    """Return the summand of each range that a rank has written."""
    return {name: _edges(name, copies.contents[name], part.start, part.stop) for name, part in copies.ranges.items()}


def _whole(name: str, kind: Kind) -> int:
    return _edges(name, kind, 0, math.prod(kind[0]))


def _edges(name: str, kind: Kind, start: int, stop: int) -> int:
    tensor = f"{name} {kind[0]} {kind[1]}"
    return _hash(f"{tensor} {stop}") - _hash(f"{tensor} {start}") if start < stop else 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
