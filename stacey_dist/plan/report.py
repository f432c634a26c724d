"""Plans as a table for a terminal, and as a dictionary for programs."""

from dataclasses import asdict, dataclass
from typing import Any

from stacey_dist.plan.hardware import GB, Gpu
from stacey_dist.plan.job import Job
from stacey_dist.plan.plans import Plan, largest_micro_batch
from stacey_dist.plan.speed import checkpoint_bytes

GIB = 2**30
MIB = 2**20
NOT_MEASURED = (
    "Weights, gradients and states at rest equal live tensors (CPUs); peaks and times were not measured on a GPU."
)


def as_dict(plan: Plan, gpu: Gpu, room: float) -> dict[str, Any]:
    """Return everything that the table says; in bytes, seconds and tokens."""
    job, speed = plan.job, plan.speed
    whole, share = checkpoint_bytes(job)
    return {
        "engine": job.engine,
        "optimizer": job.config.optimizer.name,
        "mixed_precision": job.precision,
        "parameters": job.model.elements,
        "active_parameters": job.model.active,
        "expert_parameters": job.model.in_experts,
        "gpu": gpu.name,
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_per_node,
        "global_batch_size": job.config.train.global_batch_size,
        "sequence_length": job.config.data.sequence_length,
        "micro_batch_size": job.micro_batch,
        "accumulation": job.accumulation,
        "gradient_checkpointing": job.config.train.gradient_checkpointing,
        "rank": plan.rank,
        "device_bytes": plan.memory.device,
        "host_bytes": plan.memory.host,
        "buffer_bytes": plan.memory.buffers,
        "update_bytes": plan.memory.update,
        "activation_bytes": {"saved": plan.activations.saved, "at_peak": plan.activations.peak},
        "peak_bytes": plan.peak,
        "room_bytes": int(room),
        "fits": plan.peak <= room,
        "largest_micro_batch": largest_micro_batch(job, room),
        "communication": [asdict(transfer) for transfer in speed.transfers],
        "seconds": {
            "arithmetic": list(speed.arithmetic),
            "communication": speed.communication,
            "optimizer": speed.optimizer,
            "update": [speed.fast, speed.slow],
        },
        "tokens_per_second": list(speed.tokens_per_second),
        "mfu": list(speed.mfu),
        "checkpoint": {"bytes": whole, "bytes_of_a_rank": share, "stall_seconds": share / gpu.host},
    }


@dataclass(frozen=True)
class _Unit:
    """The unit of a table's sizes."""

    name: str
    bytes: int

    def __call__(self, size: float) -> str:
        return _number(size / self.bytes)


def table(plans: list[Plan], gpu: Gpu, room: float, command: str) -> str:
    """Return plans as text: a column for each, which differ in the optimizer alone; and the command of the run."""
    unit = _Unit("GiB", GIB) if plans[0].peak >= GIB else _Unit("MiB", MIB)
    blocks = [
        _heading(plans[0].job, gpu),
        _memory(plans, gpu, room, unit),
        _communication(plans[0], gpu, unit),
        _time(plans, gpu),
        _checkpoint(plans, gpu, unit),
        f"to start it:\n{command}",
        NOT_MEASURED + "\ndocs/how-to/plan.md has the formulas and what is assumed.",
    ]
    return "\n\n".join(blocks)


def proposals(plans: list[Plan], gpu: Gpu, room: float, job: Job, command: str) -> str:
    """Return the table of the plans that a search for `job` proposes, and the command of the first."""
    if not plans:
        return (
            f"nothing fits into {_gib(room)} GiB of a {gpu.name}: use more GPUs, a shorter data.sequence_length or "
            "a smaller model"
        )
    train = job.config.train
    lines = [
        f"{_model(job, gpu)}, {_gib(room)} GiB of each, {_precision(job)}, {job.config.optimizer.name}",
        f"an update: {train.global_batch_size:,} sequences of {job.config.data.sequence_length:,} tokens",
        "",
        f"  {'engine':<16}{'micro-batch':>11}{'accumulated':>13}{'checkpointing':>15}{'peak GiB':>10}"
        f"{'host GiB':>10}{'tokens/s':>26}{'MFU':>13}",
    ]
    for plan in plans:
        host = sum(plan.memory.host.values()) * plan.job.gpus_per_node
        rate = _span(*plan.speed.tokens_per_second)
        lines.append(
            f"  {plan.job.engine:<16}{plan.job.micro_batch:>11}{plan.job.accumulation:>13}"
            f"{_on_or_off(plan.job):>15}{_gib(plan.peak):>10}{_gib(host):>10} {rate:>25}{_mfu(plan):>13}"
        )
    lines += ["", f"to start the first one:\n{command}", "", NOT_MEASURED]
    return "\n".join(lines)


def _heading(job: Job, gpu: Gpu) -> str:
    batch, length = job.config.train.global_batch_size, job.config.data.sequence_length
    return (
        f"{_model(job, gpu)}: {job.engine}, {_precision(job)}\n"
        f"an update: {batch:,} sequences of {length:,} tokens ({_count(batch * length)}); on a GPU "
        f"{job.accumulation} micro-batch{'es' if job.accumulation > 1 else ''} of {job.micro_batch}, "
        f"gradient checkpointing {_on_or_off(job)}"
    )


def _memory(plans: list[Plan], gpu: Gpu, room: float, unit: _Unit) -> str:
    first = plans[0]
    rows = {
        **_parts([plan.memory.device for plan in plans], unit),
        **_parts([plan.memory.buffers for plan in plans], unit, " (while a batch is computed)"),
        "activations, kept for the backward pass": [unit(plan.activations.saved) for plan in plans],
        "activations, for a moment": [unit(plan.activations.peak - plan.activations.saved) for plan in plans],
        "peak": [unit(plan.peak) for plan in plans],
        f"… of {_gib(gpu.memory)} GiB": [f"{plan.peak / gpu.memory:.0%}" for plan in plans],
    }
    if any(sum(plan.memory.buffers.values()) + plan.activations.peak < plan.memory.update for plan in plans):
        rows["… which is in the update"] = [unit(plan.memory.update) for plan in plans]
    rows[f"largest micro-batch, in {_gib(room)} GiB"] = [str(largest_micro_batch(plan.job, room)) for plan in plans]
    blocks = [_block(f"memory of the fullest GPU (rank {first.rank}), {unit.name}", _optimizers(plans), rows)]
    if first.peak > room:
        blocks.append("  DOES NOT FIT; --search looks for what does")
    if first.memory.host:
        host = _parts([plan.memory.host for plan in plans], unit)
        blocks.append(_block(f"host memory of a GPU's process, {unit.name}", [], host))
    return "\n".join(blocks)


def _communication(plan: Plan, gpu: Gpu, unit: _Unit) -> str:
    if not plan.speed.transfers:
        return "communication of an update: none"
    links = f"{gpu.intra / GB:,.0f} GB/s in a node"
    if plan.job.nodes > 1:
        links += f", {gpu.inter / GB * plan.job.gpus_per_node:,.0f} between nodes"
    title, tensors, sent = f"communication of an update ({links})", f"tensors {unit.name}", f"sent {unit.name}"
    lines = [f"{title:<60}{tensors:>13}{sent:>11}{'seconds':>10}"]
    for transfer in plan.speed.transfers:
        lines.append(
            f"  {f'{transfer.collective} of {transfer.what}':<58}{unit(transfer.tensor_bytes):>13}"
            f"{unit(transfer.sent_bytes):>11}{_number(transfer.seconds):>10}"
        )
    return "\n".join(lines)


def _time(plans: list[Plan], gpu: Gpu) -> str:
    low, high = gpu.efficiency
    speeds = [plan.speed for plan in plans]
    rows = {
        f"forward and backward, at {high:.0%} to {low:.0%} of peak": [_span(*speed.arithmetic) for speed in speeds],
        "communication": [_number(speed.communication) for speed in speeds],
        "optimizer": [_number(speed.optimizer) for speed in speeds],
        "update, communication all hidden to not hidden": [_span(speed.fast, speed.slow) for speed in speeds],
        "tokens per second": [_span(*speed.tokens_per_second) for speed in speeds],
        "MFU": [_mfu(plan) for plan in plans],
    }
    return _block("time of an update, seconds (assumed: see docs)", _optimizers(plans), rows)


def _checkpoint(plans: list[Plan], gpu: Gpu, unit: _Unit) -> str:
    sizes = [checkpoint_bytes(plan.job) for plan in plans]
    rows = {
        f"size, {unit.name}": [unit(whole) for whole, _ in sizes],
        f"copied by a rank, {unit.name}": [unit(share) for _, share in sizes],
        f"training stands still, seconds (at {gpu.host / GB:.0f} GB/s)": [_number(s / gpu.host) for _, s in sizes],
    }
    return _block("checkpoint", _optimizers(plans), rows)


def _block(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [(title, columns), *((f"  {name}", values) for name, values in rows.items())]
    width = max((len(value) + 1 for _, values in lines for value in values), default=0)
    return "\n".join(
        f"{name:<56}" + "".join(f"{value:>{max(20, width)}}" for value in values) for name, values in lines
    )


def _parts(parts: list[dict[str, int]], unit: _Unit, note: str = "") -> dict[str, list[str]]:
    names = dict.fromkeys(name for part in parts for name in part if any(p.get(name) for p in parts))
    return {f"{name}{note}": [unit(part.get(name, 0)) for part in parts] for name in names}


def _optimizers(plans: list[Plan]) -> list[str]:
    return [plan.job.config.optimizer.name for plan in plans]


def _on_or_off(job: Job) -> str:
    kind = job.config.train.gradient_checkpointing
    return kind if isinstance(kind, str) else "on" if kind else "off"


def _model(job: Job, gpu: Gpu) -> str:
    nodes = f" ({job.nodes} nodes of {job.gpus_per_node})" if job.nodes > 1 else ""
    model, also = job.model, ""
    if model.in_experts:
        share = model.in_experts / model.elements
        also = f" ({_count(model.active)} active; {_count(model.in_experts)}, {share:.0%}, in experts)"
    return f"{model.name} of {_count(model.elements)} parameters{also} on {job.ranks} x {gpu.name}{nodes}"


def _precision(job: Job) -> str:
    return job.config.model.dtype if job.precision == "no" else f"mixed precision {job.precision}"


def _mfu(plan: Plan) -> str:
    low, high = plan.speed.mfu
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _count(number: int) -> str:
    """Return 6738415616 as 6.74 B."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if float(f"{number:.3g}") >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)


def _gib(size: float) -> str:
    return _number(size / GIB)


def _number(value: float) -> str:
    """Return a number in three digits, since no more of them mean something; 0 as a dash."""
    rounded = float(f"{value:.3g}")
    if rounded >= 1000:
        return f"{rounded:,.0f}"
    return f"{rounded:#.3g}".rstrip(".") if value else "–"


def _span(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}"
