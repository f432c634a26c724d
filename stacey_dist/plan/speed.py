"""How long an update takes: arithmetic, communication, the optimizer, and a checkpoint. A range, from stated figures.

Communication is counted as ring algorithms move it: in an all-gather or reduce-scatter over N ranks each sends
(N-1)/N of the bytes, in an all-reduce twice that. A ring crosses each node's boundary once, so what a node's cards
carry together is the speed between nodes. Latency is left out.
"""

from dataclasses import dataclass

from stacey_dist.plan.engines import MASTER, PERSISTENT, owned_elements
from stacey_dist.plan.hardware import Gpu
from stacey_dist.plan.memory import Job
from stacey_dist.plan.model import Parameter


@dataclass(frozen=True)
class Transfer:
    """A kind of collective in an update.

    Attributes:
        what: for people.
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

    def mfu(self, seconds: float) -> float:
        """Share of the GPUs' peak that an update of so many seconds makes use of."""
        return self.flops / seconds / self.peak_flops


def speed(job: Job, gpu: Gpu, efficiency: tuple[float, float]) -> Speed:
    """The time of an update.

    Args:
        job: what is trained.
        gpu: on which GPU, with its links.
        efficiency: the least and the largest share of the GPU's peak that forward and backward reach.
    """
    length = job.config.data.sequence_length
    tokens = job.config.train.global_batch_size * length
    flops = job.model.flops_per_token(length) * tokens
    done = flops
    if job.config.train.gradient_checkpointing:  # each layer's forward pass, a third of its arithmetic, once more
        in_head = 6.0 * job.model.vocabulary * job.model.hidden * tokens
        done += (flops - in_head) / 3
    peak = gpu.float32_flops if job.arithmetic == "float32" else gpu.flops
    low, high = efficiency
    return Speed(
        arithmetic=(done / job.ranks / peak / high, done / job.ranks / peak / low),
        optimizer=_optimizer_bytes(job) / (gpu.host if job.engine == "zero3_offload" else gpu.memory_bandwidth),
        transfers=transfers(job, gpu),
        tokens=tokens,
        flops=flops,
        peak_flops=peak * job.ranks,
    )


def transfers(job: Job, gpu: Gpu) -> list[Transfer]:
    """The communication of an update."""
    setup, model, times = job.setup, job.model, job.accumulation
    elements, compute = setup.elements, setup.compute
    whole = elements * setup.weight

    def over(what: str, collective: str, size: int, ranks: int, bandwidth: float) -> Transfer:
        share = (ranks - 1) / ranks if collective != "broadcast" else 1.0
        sent = size * share * (2 if collective == "all-reduce" else 1)
        return Transfer(what, collective, size, sent, sent / bandwidth)

    def everywhere(what: str, collective: str, size: int) -> Transfer:
        return over(what, collective, size, job.ranks, _bandwidth(job, gpu))

    padded = _padded(job) * compute
    match job.engine:
        case "single":
            return []
        case "ddp":
            return [everywhere("gradients, once", "all-reduce", whole)]
        case "zero_redundancy":
            return [
                everywhere("gradients, once", "all-reduce", whole),
                everywhere("updated weights", "broadcast", whole),
            ]
        case "zero1" | "zero2":
            # DeepSpeed's buckets have slices of many ranks: it all-reduces them, and each rank takes its own.
            count = times if job.engine == "zero2" else 1
            return [
                everywhere(f"gradients, {_times(count)}", "all-reduce", elements * compute * count),
                everywhere("updated weights", "all-gather", padded),
            ]
        case "zero3" | "zero3_offload":
            small = sum(-(-p.elements // job.ranks) for p in model.parameters if p.elements <= PERSISTENT)
            small_bytes = small * job.ranks * compute
            found = [
                everywhere(f"weights, {_times(2 * times)}", "all-gather", (padded - small_bytes) * 2 * times),
                everywhere("small weights, once", "all-gather", small_bytes),
                everywhere(f"gradients, {_times(times)}", "reduce-scatter", padded * times),
            ]
            if job.engine == "zero3_offload":
                sent = padded // job.ranks * 4 * times  # to the GPU twice; gradients to the host, and added there
                found.append(Transfer("weights and gradients", "copy", sent, sent, sent / gpu.host))
            return found
        case _:
            rows = _fsdp_bytes(job)
            group, wide = (job.gpus_per_node, gpu.intra) if job.engine == "hsdp" else (job.ranks, _bandwidth(job, gpu))
            found = [
                over(
                    f"weights, {_times(2 * times)} (tail {_times(times)})", "all-gather", rows[0] * times, group, wide
                ),
                over(f"gradients, {_times(times)}", "reduce-scatter", rows[1] * times, group, wide),
            ]
            if job.engine == "hsdp":
                size = rows[1] // group * times
                # The GPUs of a node, each in a ring of its own, share the node's cards.
                found.append(over("gradients between nodes", "all-reduce", size, job.nodes, gpu.inter))
            return found


def checkpoint_bytes(job: Job) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors, and the most that one rank copies to host memory for it.

    Every element is saved once: its weight (the master where there is one), its states, and a count of updates for
    each parameter.
    """
    saved = MASTER if job.config.model.dtype == "float32" else 2
    saved += sum(job.setup.state.values())
    whole = saved * job.setup.elements
    steps = 8 * len(job.model.parameters)
    if job.engine == "zero_redundancy":
        return whole + steps, saved * max(owned_elements(job.setup))
    return whole + steps, -(-whole // job.ranks)


def _bandwidth(job: Job, gpu: Gpu) -> float:
    """Of a ring over all ranks."""
    return min(gpu.intra, gpu.inter * job.gpus_per_node) if job.nodes > 1 else gpu.intra


def _padded(job: Job) -> int:
    """Elements of all slices of DeepSpeed with their padding."""
    if job.engine in ("zero1", "zero2"):
        sizes = [sum(p.elements for p in group) for group in job.setup.groups]
        return sum(-(-size // (2 * job.ranks)) * 2 * job.ranks for size in sizes)
    return sum(-(-p.elements // job.ranks) * job.ranks for p in job.model.parameters)


def _fsdp_bytes(job: Job) -> tuple[int, int]:
    """Bytes that a micro-batch gathers (forward and backward; the tail once) and scatters, with the padding."""
    ranks = job.gpus_per_node if job.engine == "hsdp" else job.ranks
    compute = job.setup.compute

    def size(parameters: list[Parameter]) -> int:
        return sum(-(-p.shape[0] // ranks) * ranks * (p.elements // p.shape[0]) for p in parameters) * compute

    units = [size(unit) for unit in job.model.units]
    return 2 * sum(units[:-1]) + units[-1], sum(units)


def _optimizer_bytes(job: Job) -> int:
    """Bytes that an update reads and writes on a rank: weight and states twice, the gradient once."""
    held = job.held
    where = held.host or held.device
    states = sum(where[name] for name in job.setup.state)
    master = where["masters"] or where["weights"]
    elements = states // max(1, sum(job.setup.state.values()))
    if job.setup.state and job.engine == "zero_redundancy":
        return elements * 3 * MASTER + 2 * states
    return 2 * master + where["gradients"] + 2 * states


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
