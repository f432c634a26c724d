"""Bytes that each engine keeps on a rank: padding, dtypes and buffers as torch 2.13 and DeepSpeed 0.19 make them.

Every number here is compared with the live tensors of a run (`tests/plan/test_ranks.py`).
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate

from stacey_dist.plan.activations import Activations
from stacey_dist.plan.job import Job

# DeepSpeed's defaults, which configs/accelerate leaves as they are; elements, not bytes.
BUCKET = 500_000_000  # reduce_bucket_size: a buffer of its own for gradients on their way
SUB_GROUP = 1_000_000_000  # sub_group_size: ZeRO-3 updates so many elements of a rank at a time
PERSISTENT = 100_000  # stage3_param_persistence_threshold: parameters up to this size stay whole
MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters: how many ZeRO-3 keeps gathered beside those

MASTER = 4  # bytes of a float32


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank, by what they are for.

    Attributes:
        device: "weights", "gradients" (after a backward pass), "masters" and the optimizer's states.
        host: the same, where they lie in host memory.
        buffers: the engine's own, on the device, for as long as a forward and backward pass takes.
        update: what the device has besides in the update, when no activations are there.
    """

    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    update: int = 0

    def peak(self, acts: Activations) -> int:
        """Return the most bytes on the device at once, with the activations of a micro-batch.

        Gradients are counted as a whole beside all activations: from an update's second micro-batch on they are.
        """
        return sum(self.device.values()) + max(sum(self.buffers.values()) + acts.peak, self.update)


def single(job: Job, rank: int) -> RankMemory:
    """Return what one process keeps: everything, in the dtype in which it was made; autocast casts on the way."""
    elements = job.model.elements
    return RankMemory(_parts(job, elements * job.weight_bytes, elements * job.weight_bytes, 0, elements))


def ddp(job: Job, rank: int) -> RankMemory:
    """Return what DDP keeps: the same, and buckets for gradients (torch's `gradient_as_bucket_view` is off)."""
    return replace(single(job, rank), buffers={"gradient buckets": job.model.elements * job.weight_bytes})


def zero_redundancy(job: Job, rank: int) -> RankMemory:
    """Return what DDP keeps, with the states of the parameters that this rank updates alone."""
    memory, owned = ddp(job, rank), owned_elements(job)[rank]
    return replace(memory, device=memory.device | {name: size * owned for name, size in job.state_bytes.items()})


def owned_elements(job: Job) -> list[int]:
    """Return the elements that ZeroRedundancyOptimizer has each rank update.

    The largest parameter comes first, and goes to the rank that has least, the first of several.
    """
    sizes = [(0, rank) for rank in range(job.ranks)]  # a heap
    for group in job.groups:
        for parameter in sorted(group, key=lambda p: p.elements, reverse=True):
            size, rank = sizes[0]
            heapq.heapreplace(sizes, (size + parameter.elements, rank))
    return [size for size, _ in sorted(sizes, key=lambda owned: owned[1])]


def zero1(job: Job, rank: int) -> RankMemory:
    """Return what ZeRO-1 keeps: gradients in the weights' dtype, and whole until the last micro-batch reduces them."""
    buffers = {"gradient bucket": BUCKET * job.compute_bytes, "whole gradients": job.model.elements * job.compute_bytes}
    return replace(_by_parameters(job, rank), buffers=buffers)


def zero2(job: Job, rank: int) -> RankMemory:
    """Return what ZeRO-2 keeps: flat groups, padded to 2 elements a rank, and one slice of each a rank's own.

    In mixed precision, the float32 sum of a slice's gradients, on which the update works. Else the gradients of all
    parameters that a slice cuts through; from the second micro-batch of an update on, its own beside the sum.
    """
    if job.compute_bytes == MASTER:
        return _by_parameters(job, rank)
    owned, compute = sum(flat_slices(job)), job.compute_bytes
    device = _parts(job, owned * job.ranks * compute, owned * MASTER, owned * MASTER, owned)
    return RankMemory(device, buffers={"gradient bucket": BUCKET * compute})


def _by_parameters(job: Job, rank: int) -> RankMemory:
    """Return what ZeRO-1 and 2 keep where they add gradients in the weights' dtype."""
    sizes, gradients = flat_slices(job), kept_gradients(job)[rank]
    compute, owned = job.compute_bytes, sum(sizes)
    buffers = {"gradient bucket": BUCKET * compute}
    if job.accumulation > 1:
        buffers["gradients to be added"] = gradients * compute
    device = _parts(job, owned * job.ranks * compute, gradients * compute, owned * MASTER, owned)
    # A group at a time: the slice of its gradients made flat, and in float32.
    flat = compute if compute < MASTER else 0
    return RankMemory(device, buffers=buffers, update=max(sizes) * (flat + MASTER))


def kept_gradients(job: Job) -> list[int]:
    """Return the gradient elements, with padding, that each rank keeps in `_by_parameters`."""
    kept = [0] * job.ranks
    for group, size in zip(job.groups, flat_slices(job), strict=True):
        bounds = list(accumulate((p.elements for p in group), initial=0))
        for rank in range(job.ranks):
            start, stop = rank * size, (rank + 1) * size
            if start < bounds[-1]:  # from the beginning of its first parameter to the end of its last
                last = bounds[bisect_left(bounds, min(stop, bounds[-1]))]
                kept[rank] += last - bounds[bisect_right(bounds, start) - 1]
            kept[rank] += min(size, max(0, stop - bounds[-1]))
    return kept


def flat_slices(job: Job) -> list[int]:
    """Return the elements of a rank's slice of each flat group of ZeRO-1 and 2, with the padding."""
    return [_ceil(sum(p.elements for p in group), 2 * job.ranks) * 2 for group in job.groups]


def zero3(job: Job, rank: int) -> RankMemory:
    """Return what ZeRO-3 keeps: each parameter padded to a multiple of the ranks and cut; gradients in float32."""
    owned, compute = sum(map(sum, cut_parameters(job))), job.compute_bytes
    largest = 0
    for group in cut_parameters(job):
        current = 0
        for size in group:
            current += size
            largest = max(largest, current)
            current = 0 if current >= SUB_GROUP else current
    device, buffers = _parts(job, owned * compute, owned * MASTER, owned * MASTER, owned), _zero3_buffers(job)
    not_freed = buffers["gradient bucket"] + buffers["small weights"]
    return RankMemory(device, buffers=buffers, update=not_freed + largest * MASTER)


def zero3_offload(job: Job, rank: int) -> RankMemory:
    """Return what ZeRO-3 keeps with its slices in host memory; the device has gathered weights and the bucket.

    The host has the gradients twice: their sum, and a copy for the update.
    """
    owned, compute = sum(map(sum, cut_parameters(job))), job.compute_bytes
    host = _parts(job, owned * compute, owned * 2 * MASTER, owned * MASTER, owned)
    return RankMemory(_parts(job, 0, 0, 0, 0), host=host, buffers=_zero3_buffers(job))


def cut_parameters(job: Job) -> list[list[int]]:
    """Return the elements of a rank's piece of each parameter, by group, under ZeRO-3; with the padding."""
    return [[_ceil(p.elements, job.ranks) for p in group] for group in job.groups]


def fsdp2(job: Job, rank: int) -> RankMemory:
    """Return what FSDP2 keeps: rows of each parameter; weights and gradients with padding to equal numbers of rows."""
    ranks, rank = job.shard_ranks, rank % job.shard_ranks
    padded = own = 0
    for parameter in job.model.parameters:
        rows, row = parameter.shape[0], parameter.elements // parameter.shape[0]
        longest = _ceil(rows, ranks)
        padded += longest * row
        own += (min(rows, longest * (rank + 1)) - min(rows, longest * rank)) * row
    tail = sum(p.elements for p in job.model.tail)
    layer = max((sum(p.elements for p in unit) for unit in job.model.layers), default=tail)
    buffers = {
        # Two layers, of which one is on its way, and the tail, which stays gathered into the backward pass.
        "gathered weights": (2 * layer + tail) * job.compute_bytes,
        # What an all-gather works on, the gradients of a unit, and those as the reduce-scatter adds them.
        "gather and scatter": max(sum(p.elements for p in unit) for unit in job.model.units)
        * (2 * job.compute_bytes + job.weight_bytes),
    }
    return RankMemory(_parts(job, padded * job.weight_bytes, padded * job.weight_bytes, 0, own), buffers=buffers)


ENGINES: dict[str, Callable[[Job, int], RankMemory]] = {
    **{f.__name__: f for f in (single, ddp, zero_redundancy, zero1, zero2, zero3, zero3_offload, fsdp2)},
    "hsdp": fsdp2,  # within a group of ranks; other groups have replicas
}


def most_loaded_rank(job: Job) -> tuple[int, RankMemory]:
    """Return the rank that keeps most on its device (the first of several), and what it keeps."""
    elements = [0]  # on other engines rank 0 has no fewer rows than another
    if job.engine == "zero1" or (job.engine == "zero2" and job.compute_bytes == MASTER):
        elements = kept_gradients(job)
    elif job.engine == "zero_redundancy" and job.state_bytes:
        elements = owned_elements(job)
    rank = elements.index(max(elements))
    return rank, ENGINES[job.engine](job, rank)


def _parts(job: Job, weights: int, gradients: int, masters: int, elements: int) -> dict[str, int]:
    states = {name: size * elements for name, size in job.state_bytes.items()}
    return {"weights": weights, "gradients": gradients, "masters": masters, **states}


def _zero3_buffers(job: Job) -> dict[str, int]:
    small = sum(p.elements for p in job.model.parameters if p.elements <= PERSISTENT)
    return {
        "gradient bucket": BUCKET * job.compute_bytes,
        "small weights": small * job.compute_bytes,
        "gathered weights": min(job.model.elements - small, MAX_LIVE) * job.compute_bytes,
    }


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
