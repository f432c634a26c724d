"""How long an update takes: arithmetic, communication, the optimizer, and a checkpoint. A range, from stated figures.

Communication is counted as ring algorithms move it: in an all-gather or reduce-scatter over N ranks each sends
(N-1)/N of the bytes, in an all-reduce twice that. A ring crosses each node's boundary once, so what a node's cards
carry together is the speed between nodes. Latency is left out.
"""

from dataclasses import dataclass

from stacey_dist.plan.hardware import Gpu
from stacey_dist.plan.job import Job
from stacey_dist.plan.memory import MASTER, PERSISTENT, RankMemory, cut_parameters, flat_slices, owned_elements
from stacey_dist.plan.model import Parameter


@dataclass(frozen=True)
class Transfer:
    """A kind of collective in an update.

    Attributes:
        what: a human-readable name.
        collective: "all-reduce", "reduce-scatter", "all-gather" or "broadcast"; "copy" to or from the host.
        tensor_bytes: of the whole tensors, over all calls in an update.
        sent_bytes: what a rank sends of them.
        seconds: how long at the given bandwidth.
    """

    what: str
    collective: str
    tensor_bytes: int
    sent_bytes: float
    seconds: float


@dataclass(frozen=True)
class Speed:
    """An update's time in seconds, and what follows.

    Attributes:
        arithmetic: forward and backward at the (high, low) efficiency.
        optimizer: the update's pass over memory at the full bandwidth of the memory.
        transfers: the communication.
        fast, slow: the whole: all communication hidden behind arithmetic at the high efficiency; none hidden, at the
            low one.
        tokens: of an update, over all ranks.
        flops: operations of an update that count for the MFU.
        peak_flops: of all GPUs.
    """

    arithmetic: tuple[float, float]
    optimizer: float
    transfers: list[Transfer]
    tokens: int
    flops: float
    peak_flops: float

    @property
    def communication(self) -> float:
        """Seconds of all transfers one after another."""
        return sum(transfer.seconds for transfer in self.transfers)

    @property
    def fast(self) -> float:
        """Seconds of an update at best."""
        return max(self.arithmetic[0], self.communication) + self.optimizer

    @property
    def slow(self) -> float:
        """Seconds of an update at worst."""
        return self.arithmetic[1] + self.communication + self.optimizer

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """At worst and at best."""
        return self.tokens / self.slow, self.tokens / self.fast

    @property
    def mfu(self) -> tuple[float, float]:
        """The share of the GPUs' peak that is used, at worst and at best."""
        return self.flops / self.slow / self.peak_flops, self.flops / self.fast / self.peak_flops


def estimate_speed(job: Job, memory: RankMemory, gpu: Gpu) -> Speed:
    """Return the time of an update.

    Args:
        job: what is trained.
        memory: what the most loaded rank keeps.
        gpu: on which GPU, with its links and its efficiency.
    """
    length = job.config.data.sequence_length
    tokens = job.config.train.global_batch_size * length
    flops = job.model.flops_per_token * tokens
    done = flops
    # Each layer's forward pass, a third of its arithmetic, once more; selectively nothing that is counted.
    if job.config.train.gradient_checkpointing is True:
        done += (flops - 6.0 * job.model.head * tokens) / 3
    peak = job.ranks * (gpu.float32_flops if job.arithmetic == "float32" else gpu.flops)
    low, high = gpu.efficiency
    return Speed(
        arithmetic=(done / peak / high, done / peak / low),
        optimizer=_optimizer_bytes(job, memory) / (gpu.host if memory.host else gpu.memory_bandwidth),
        transfers=transfers(job, gpu),
        tokens=tokens,
        flops=flops,
        peak_flops=peak,
    )


def transfers(job: Job, gpu: Gpu) -> list[Transfer]:
    """Return the communication of an update."""
    times, compute = job.accumulation, job.compute_bytes
    weights = job.model.elements * job.weight_bytes
    ring = min(gpu.intra, gpu.inter * job.gpus_per_node) if job.nodes > 1 else gpu.intra

    def everywhere(what: str, collective: str, size: int) -> Transfer:
        return _transfer(what, collective, size, job.ranks, ring)

    match job.engine:
        case "single":
            return []
        case "ddp":
            return [everywhere("gradients, once", "all-reduce", weights)]
        case "zero_redundancy":
            return [
                everywhere("gradients, once", "all-reduce", weights),
                everywhere("updated weights", "broadcast", weights),
            ]
        case "zero1" | "zero2":
            # DeepSpeed's buckets have slices of many ranks: it all-reduces them, and each rank takes its own.
            count = times if job.engine == "zero2" else 1
            return [
                everywhere(f"gradients, {_times(count)}", "all-reduce", job.model.elements * compute * count),
                everywhere("updated weights", "all-gather", sum(flat_slices(job)) * job.ranks * compute),
            ]
        case "zero3" | "zero3_offload":
            share = sum(map(sum, cut_parameters(job))) * compute
            small = [p.elements for p in job.model.parameters if p.elements <= PERSISTENT]
            small_bytes = sum(-(-elements // job.ranks) for elements in small) * job.ranks * compute
            padded = share * job.ranks
            found = [
                everywhere(f"weights, {_times(2 * times)}", "all-gather", (padded - small_bytes) * 2 * times),
                everywhere("small weights, once", "all-gather", small_bytes),
                everywhere(f"gradients, {_times(times)}", "reduce-scatter", padded * times),
            ]
            if job.engine == "zero3_offload":
                # Weights to the GPU twice; the float32 sum of the gradients to the GPU and back.
                sent = share // compute * 2 * (compute + MASTER) * times
                found.append(Transfer("weights and gradients", "copy", sent, sent, sent / gpu.host))
            return found
        case _:
            units = [_padded_rows(unit, job.shard_ranks) for unit in job.model.units]
            gathered = (2 * sum(units) - units[-1]) * compute * times
            scattered = sum(units) * job.weight_bytes * times  # gradients are added in the weights' dtype
            bandwidth = gpu.intra if job.engine == "hsdp" else ring
            what = f"weights, {_times(2 * times)} (tail {_times(times)})"
            found = [
                _transfer(what, "all-gather", gathered, job.shard_ranks, bandwidth),
                _transfer(f"gradients, {_times(times)}", "reduce-scatter", scattered, job.shard_ranks, bandwidth),
            ]
            if job.engine == "hsdp":
                size = scattered // job.shard_ranks
                # The GPUs of a node, each in a ring of its own, share the node's cards.
                found.append(_transfer("gradients between nodes", "all-reduce", size, job.nodes, gpu.inter))
            return found


def checkpoint_bytes(job: Job) -> tuple[int, int]:
    """Return the bytes of a checkpoint's tensors, and the most that one rank copies to host memory for it.

    Every element is saved once: its weight (the master where there is one), its states, and a count of updates for
    each parameter.
    """
    element = job.weight_bytes + sum(job.state_bytes.values())
    whole, counts = element * job.model.elements, 8 * len(job.model.parameters)
    if job.engine == "zero_redundancy":
        return whole + counts, element * max(owned_elements(job))
    return whole + counts, -(-whole // job.ranks)


def _transfer(what: str, collective: str, size: int, ranks: int, bandwidth: float) -> Transfer:
    share = 1.0 if collective == "broadcast" else (ranks - 1) / ranks
    sent = size * share * (2 if collective == "all-reduce" else 1)
    return Transfer(what, collective, size, sent, sent / bandwidth)


def _padded_rows(parameters: list[Parameter], ranks: int) -> int:
    """Return the elements of FSDP2's parameters with the rows that make equal pieces of them."""
    return sum(-(-p.shape[0] // ranks) * ranks * (p.elements // p.shape[0]) for p in parameters)


def _optimizer_bytes(job: Job, memory: RankMemory) -> int:
    """Return the bytes that an update reads and writes on a rank: weight and states twice, the gradient once."""
    kept = memory.host or memory.device
    states = sum(kept[name] for name in job.state_bytes)
    if states and job.engine == "zero_redundancy":
        return states // sum(job.state_bytes.values()) * 3 * MASTER + 2 * states
    return 2 * (kept["masters"] or kept["weights"]) + kept["gradients"] + 2 * states


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
