"""What each engine keeps on a rank, in bytes: padding, dtypes and buffers as torch 2.13 and DeepSpeed 0.19 make them.

Every number here is compared with the live tensors of a run (`tests/test_plan_ranks.py`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from stacey_dist.plan.model import Llama, Parameter

# DeepSpeed's defaults, which configs/accelerate leaves as they are; elements, not bytes.
BUCKET = 500_000_000  # reduce_bucket_size: a buffer of its own for gradients on their way
SUB_GROUP = 1_000_000_000  # sub_group_size: ZeRO-3 updates so many elements of a rank at a time
PERSISTENT = 100_000  # stage3_param_persistence_threshold: parameters up to this size stay whole
MAX_LIVE = 1_000_000_000  # stage3_max_live_parameters: how many ZeRO-3 keeps gathered beside those

MASTER = 4  # bytes of a float32


@dataclass(frozen=True)
class Setup:
    """What is sharded, over how many ranks, in which dtypes.

    Attributes:
        model: the model.
        groups: its parameters in the optimizer's groups.
        ranks: how many processes there are.
        shard_ranks: over how many of them HSDP shards; the others are replicas.
        weight: bytes of a weight as the program made it (4, or 2 for model.dtype bfloat16).
        compute: bytes of a weight in forward and backward (2 in mixed precision).
        state: bytes of an element in each of the optimizer's states, by name.
        accumulation: micro-batches of an update.
    """

    model: Llama
    groups: list[list[Parameter]]
    ranks: int
    shard_ranks: int
    weight: int
    compute: int
    state: dict[str, int]
    accumulation: int = 1

    @property
    def elements(self) -> int:
        """The number of parameters."""
        return self.model.elements


@dataclass(frozen=True)
class Held:
    """Bytes on a rank, by what they are for.

    Attributes:
        device: "weights", "gradients" (after a backward pass), "masters" and the optimizer's states.
        host: the same, where they lie in host memory.
        buffers: the engine's own, on the device, for as long as a forward and backward pass takes.
        update: what the update needs for a moment, when no activations are there.
    """

    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    update: int = 0


def single(setup: Setup, rank: int) -> Held:
    """One process: everything, in the dtype in which it was made; autocast casts on the way."""
    elements = setup.elements
    return Held(_parts(setup, elements * setup.weight, elements * setup.weight, 0, elements))


def ddp(setup: Setup, rank: int) -> Held:
    """DDP: the same, and buckets in which gradients travel (torch's `gradient_as_bucket_view` is off)."""
    return Held(single(setup, rank).device, buffers={"gradient buckets": setup.elements * setup.weight})


def zero_redundancy(setup: Setup, rank: int) -> Held:
    """DDP, with the states of the parameters that this rank updates."""
    held = ddp(setup, rank)
    owned = owned_elements(setup)[rank]
    states = {name: size * owned for name, size in setup.state.items()}
    return Held(held.device | states, buffers=held.buffers)


def owned_elements(setup: Setup) -> list[int]:
    """Elements that ZeroRedundancyOptimizer has each rank update: the largest parameter first, to who has least."""
    sizes = [0] * setup.ranks
    for group in setup.groups:
        for parameter in sorted(group, key=lambda p: p.elements, reverse=True):
            sizes[sizes.index(min(sizes))] += parameter.elements
    return sizes


def zero1(setup: Setup, rank: int) -> Held:
    """DeepSpeed ZeRO-1: whole weights; whole gradients until the last micro-batch reduces them."""
    held = zero2(setup, rank)
    whole = {"whole gradients": setup.elements * setup.compute}
    bucket = {name: size for name, size in held.buffers.items() if name == "gradient bucket"}
    return Held(held.device, buffers=bucket | whole, update=held.update)


def zero2(setup: Setup, rank: int) -> Held:
    """DeepSpeed ZeRO-2: flat groups, padded to 2 elements a rank, and one slice of each a rank's own.

    The gradients of a slice are kept with all of the parameters that it cuts through. From the second micro-batch of
    an update on, its gradients are added to the first one's: there are two.
    """
    padded = slices = gradients = largest = 0
    for group in setup.groups:
        size = _ceil(sum(p.elements for p in group), 2 * setup.ranks) * 2
        padded += size * setup.ranks
        slices += size
        largest = max(largest, size)
        start = 0
        for parameter in group:
            stop = start + parameter.elements
            if start < (rank + 1) * size and stop > rank * size:
                gradients += parameter.elements
            start = stop
        gradients += min(size, max(0, (rank + 1) * size - start))  # the padding, which has gradients too
    compute = setup.compute
    buffers = {"gradient bucket": BUCKET * compute}
    if setup.accumulation > 1:
        buffers["gradients to be added"] = gradients * compute
    device = _parts(setup, padded * compute, gradients * compute, slices * MASTER, slices)
    # Of a group at a time: the slice of its gradients made flat, and in float32.
    return Held(device, buffers=buffers, update=largest * (MASTER + (compute if compute < MASTER else 0)))


def zero3(setup: Setup, rank: int) -> Held:
    """DeepSpeed ZeRO-3: each parameter padded to a multiple of the ranks and cut."""
    slices, largest = _zero3_slices(setup)
    compute = setup.compute
    device = _parts(setup, slices * compute, slices * compute, slices * MASTER, slices)
    update = largest * (MASTER + (compute if compute < MASTER else 0))
    return Held(device, buffers=_zero3_buffers(setup), update=update)


def zero3_offload(setup: Setup, rank: int) -> Held:
    """ZeRO-3 whose slices rest in host memory; on the device is what is gathered, and the gradients' bucket.

    The host has the gradients twice: as they come, and in float32 for the update.
    """
    slices, _ = _zero3_slices(setup)
    gradients = slices * (setup.compute + MASTER)
    host = _parts(setup, slices * setup.compute, gradients, slices * MASTER, slices)
    return Held(_parts(setup, 0, 0, 0, 0), host=host, buffers=_zero3_buffers(setup))


def fsdp2(setup: Setup, rank: int) -> Held:
    """FSDP2: rows of each parameter; weights and gradients padded to equal numbers of rows, the states not."""
    return _rows(setup, rank, setup.ranks)


def hsdp(setup: Setup, rank: int) -> Held:
    """FSDP2 within a group of ranks, replicas between groups."""
    return _rows(setup, rank % setup.shard_ranks, setup.shard_ranks)


ENGINES: dict[str, Callable[[Setup, int], Held]] = {
    engine.__name__: engine
    for engine in (single, ddp, zero_redundancy, zero1, zero2, zero3, zero3_offload, fsdp2, hsdp)
}


def fullest(engine: str, setup: Setup) -> tuple[int, Held]:
    """The rank that holds most on its device, and what it holds; the first one of several."""
    alike = engine in ("single", "ddp", "zero3", "zero3_offload", "fsdp2", "hsdp")  # rank 0 has no fewer rows
    ranks: Iterable[int] = [0] if alike else range(setup.ranks)
    held = {rank: ENGINES[engine](setup, rank) for rank in ranks}
    rank = max(held, key=lambda r: sum(held[r].device.values()))
    return rank, held[rank]


def largest_unit(model: Llama) -> int:
    """Elements of what FSDP2 gathers at once, at most."""
    return max(sum(p.elements for p in unit) for unit in model.units)


def _parts(setup: Setup, weights: int, gradients: int, masters: int, elements: int) -> dict[str, int]:
    states = {name: size * elements for name, size in setup.state.items()}
    return {"weights": weights, "gradients": gradients, "masters": masters, **states}


def _rows(setup: Setup, rank: int, ranks: int) -> Held:
    padded = own = 0
    for parameter in setup.model.parameters:
        rows, row = parameter.shape[0], parameter.elements // parameter.shape[0]
        longest = _ceil(rows, ranks)
        padded += longest * row
        own += (min(rows, longest * (rank + 1)) - min(rows, longest * rank)) * row
    model, compute = setup.model, setup.compute
    layer, tail = (sum(p.elements for p in unit) for unit in (model.layer(), model.tail))
    buffers = {
        # Two layers, of which one is on its way, and the tail, which stays gathered into the backward pass.
        "gathered weights": (2 * layer + tail) * compute,
        # What an all-gather and a reduce-scatter work on, and the gradients of a unit before they are scattered.
        "gather and scatter": 3 * largest_unit(model) * compute,
    }
    return Held(_parts(setup, padded * setup.weight, padded * setup.weight, 0, own), buffers=buffers)


def _zero3_slices(setup: Setup) -> tuple[int, int]:
    """A rank's elements with the padding, and those that are updated at a time."""
    slices = largest = 0
    for group in setup.groups:
        current = 0
        for parameter in group:
            current += _ceil(parameter.elements, setup.ranks)
            largest = max(largest, current)
            slices += _ceil(parameter.elements, setup.ranks)
            current = 0 if current >= SUB_GROUP else current
    return slices, largest


def _zero3_buffers(setup: Setup) -> dict[str, int]:
    small = sum(p.elements for p in setup.model.parameters if p.elements <= PERSISTENT)
    return {
        "gradient bucket": BUCKET * setup.compute,
        "small weights": small * setup.compute,
        "gathered weights": min(setup.elements - small, MAX_LIVE) * setup.compute,
    }


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
