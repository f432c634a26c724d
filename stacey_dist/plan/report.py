"""A plan as a table for a terminal, and as a dictionary for programs."""

from typing import Any

from stacey_dist.plan.hardware import GB, Gpu
from stacey_dist.plan.memory import Job
from stacey_dist.plan.search import Proposal
from stacey_dist.plan.speed import Speed, checkpoint_bytes

GIB = 2**30
NOT_MEASURED = "Bytes that rest are checked against live tensors on CPUs; peaks and times were not measured on a GPU."


def as_dict(job: Job, gpu: Gpu, speed: Speed, room: float) -> dict[str, Any]:
    """Everything that the table says; bytes, seconds and tokens."""
    whole, share = checkpoint_bytes(job)
    acts = job.activations
    return {
        "engine": job.engine,
        "optimizer": job.config.optimizer.name,
        "mixed_precision": job.precision,
        "parameters": job.model.elements,
        "gpu": gpu.name,
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_per_node,
        "global_batch_size": job.config.train.global_batch_size,
        "sequence_length": job.config.data.sequence_length,
        "micro_batch_size": job.micro_batch,
        "accumulation": job.accumulation,
        "gradient_checkpointing": job.config.train.gradient_checkpointing,
        "rank": job.rank,
        "device_bytes": job.held.device,
        "host_bytes": job.held.host,
        "host_bytes_to_build": job.host_bytes_to_build,
        "buffer_bytes": job.held.buffers,
        "update_bytes": job.held.update,
        "activation_bytes": {"saved": acts.saved, "at_peak": acts.peak},
        "peak_bytes": job.peak,
        "room_bytes": int(room),
        "fits": job.peak <= room,
        "largest_micro_batch": job.largest_micro_batch(room),
        "communication": [
            {
                "what": t.what,
                "collective": t.collective,
                "tensor_bytes": t.tensor_bytes,
                "sent_bytes": t.sent_bytes,
                "seconds": t.seconds,
            }
            for t in speed.transfers
        ],
        "seconds": {
            "arithmetic": list(speed.arithmetic),
            "communication": speed.communication,
            "optimizer": speed.optimizer,
            "update": [speed.fast, speed.slow],
        },
        "tokens_per_second": [speed.tokens / speed.slow, speed.tokens / speed.fast],
        "mfu": [speed.mfu(speed.slow), speed.mfu(speed.fast)],
        "checkpoint": {"bytes": whole, "bytes_of_a_rank": share, "stall_seconds": share / gpu.host},
    }


def table(jobs: list[Job], gpu: Gpu, speeds: list[Speed], room: float, efficiency: tuple[float, float]) -> str:
    """The plan for people: one column for each job, which differ in the optimizer alone."""
    first, speed = jobs[0], speeds[0]
    blocks = [
        _heading(first, gpu),
        _memory(jobs, gpu, room),
        _communication(speed, first, gpu),
        _time(jobs, speeds, efficiency),
        _checkpoint(jobs, gpu),
        NOT_MEASURED + "\ndocs/plan.md has the formulas and what is assumed.",
    ]
    return "\n\n".join(blocks)


def proposals(found: list[Proposal], gpu: Gpu, room: float, job: Job) -> str:
    """The table of a search."""
    if not found:
        return (
            f"nothing fits into {size(room)} of a {gpu.name}: more GPUs, a shorter data.sequence_length or "
            "a smaller model do"
        )
    train = job.config.train
    lines = [
        f"LLaMA of {count(job.model.elements)} parameters on {machines(job, gpu)}, {size(room)} of each, "
        f"{precision_name(job)}, {job.config.optimizer.name}",
        f"an update: {train.global_batch_size:,} sequences of {job.config.data.sequence_length:,} tokens",
        "",
        f"  {'engine':<16}{'micro-batch':>11}{'accumulated':>13}{'checkpointing':>15}{'peak GiB':>10}"
        f"{'host GiB':>10}{'tokens/s':>26}{'MFU':>13}",
    ]
    for proposal in found:
        planned, timed = proposal.job, proposal.speed
        lines.append(
            f"  {planned.engine:<16}{planned.micro_batch:>11}{planned.accumulation:>13}"
            f"{'on' if planned.config.train.gradient_checkpointing else 'off':>15}{planned.peak / GIB:>10.1f}"
            f"{_gib(sum(planned.held.host.values()) * planned.gpus_per_node):>10}"
            f"{span(timed.tokens / timed.slow, timed.tokens / timed.fast):>26}"
            f"{span(100 * timed.mfu(timed.slow), 100 * timed.mfu(timed.fast)) + ' %':>13}"
        )
    best = found[0].job
    checkpointing = str(best.config.train.gradient_checkpointing).lower()
    name = {"single": "gpu"}.get(best.engine, best.engine)
    lines += [
        "",
        f"the first one: accelerate launch --config_file configs/accelerate/{name}.yaml … train_llm.py --config … \\",
        f"  --train.global_batch_size {train.global_batch_size} --train.micro_batch_size {best.micro_batch} "
        f"--train.gradient_checkpointing {checkpointing}",
        "",
        NOT_MEASURED,
    ]
    return "\n".join(lines)


def _heading(job: Job, gpu: Gpu) -> str:
    train, length = job.config.train, job.config.data.sequence_length
    tokens = train.global_batch_size * length
    return (
        f"LLaMA of {count(job.model.elements)} parameters on {machines(job, gpu)}: "
        f"{job.engine}, {precision_name(job)}\n"
        f"an update: {train.global_batch_size:,} sequences of {length:,} tokens ({count(tokens)}); on a GPU "
        f"{job.accumulation} micro-batch{'es' if job.accumulation > 1 else ''} of {job.micro_batch}, "
        f"gradient checkpointing {'on' if train.gradient_checkpointing else 'off'}"
    )


def _memory(jobs: list[Job], gpu: Gpu, room: float) -> str:
    rows: dict[str, list[int | None]] = {}

    def add(place: str, parts: list[dict[str, int]]) -> None:
        for name in dict.fromkeys(name for part in parts for name in part):
            values = [part.get(name) for part in parts]
            if any(values):
                rows[f"{name}{place}"] = values

    add("", [job.held.device for job in jobs])
    add(" (while a batch is computed)", [job.held.buffers for job in jobs])
    rows["activations, kept for the backward pass"] = [job.activations.saved for job in jobs]
    rows["activations, for a moment"] = [job.activations.peak - job.activations.saved for job in jobs]
    first = jobs[0]
    title = f"memory of the fullest GPU (rank {first.rank}), GiB"
    lines = [_row(title, [job.config.optimizer.name for job in jobs])]
    lines += [_row(f"  {name}", [_gib(value) for value in values]) for name, values in rows.items()]
    lines.append(_row("  peak", [_gib(job.peak) for job in jobs]))
    lines.append(_row(f"  … of {gpu.memory / GIB:.1f} GiB", [f"{job.peak / gpu.memory:.0%}" for job in jobs]))
    if any(sum(job.held.buffers.values()) + job.activations.peak < job.held.update for job in jobs):
        lines.append(_row("  … which is in the update", [_gib(job.held.update) for job in jobs]))
    lines.append(
        _row(f"  largest micro-batch, in {room / GIB:.1f} GiB", [str(job.largest_micro_batch(room)) for job in jobs])
    )
    if first.peak > room:
        lines.append("  DOES NOT FIT; --search looks for what does")
    title = "memory of the first node to build the model, GiB"
    lines.append(_row(title, [_gib(job.host_bytes_to_build) for job in jobs]))
    if first.held.host:
        lines.append(_row("host memory of a GPU's process, GiB", ["" for _ in jobs]))
        for name in dict.fromkeys(name for job in jobs for name in job.held.host):
            values = [job.held.host.get(name) for job in jobs]
            if any(values):
                lines.append(_row(f"  {name}", [_gib(value) for value in values]))
    return "\n".join(lines)


def _communication(speed: Speed, job: Job, gpu: Gpu) -> str:
    if not speed.transfers:
        return "communication of an update: none"
    links = f"{gpu.intra / GB:,.0f} GB/s in a node"
    if job.nodes > 1:
        links += f", {gpu.inter / GB * job.gpus_per_node:,.0f} between nodes"
    lines = [f"{f'communication of an update ({links})':<60}{'tensors GiB':>13}{'sent GiB':>11}{'seconds':>10}"]
    for transfer in speed.transfers:
        lines.append(
            f"  {f'{transfer.collective} of {transfer.what}':<58}{_gib(transfer.tensor_bytes):>13}"
            f"{_gib(transfer.sent_bytes):>11}{_seconds(transfer.seconds):>10}"
        )
    return "\n".join(lines)


def _time(jobs: list[Job], speeds: list[Speed], efficiency: tuple[float, float]) -> str:
    low, high = efficiency
    lines = [_row("time of an update, seconds (assumed: see docs)", [job.config.optimizer.name for job in jobs])]
    parts = {
        f"forward and backward, at {high:.0%} to {low:.0%} of peak": [_span_seconds(*s.arithmetic) for s in speeds],
        "communication": [_seconds(s.communication) for s in speeds],
        "optimizer": [_seconds(s.optimizer) for s in speeds],
        "update, communication all hidden to not hidden": [_span_seconds(s.fast, s.slow) for s in speeds],
        "tokens per second": [span(s.tokens / s.slow, s.tokens / s.fast) for s in speeds],
        "MFU": [span(100 * s.mfu(s.slow), 100 * s.mfu(s.fast)) + " %" for s in speeds],
    }
    return "\n".join(lines + [_row(f"  {name}", values) for name, values in parts.items()])


def _checkpoint(jobs: list[Job], gpu: Gpu) -> str:
    sizes = [checkpoint_bytes(job) for job in jobs]
    rows = {
        "size, GiB": [_gib(whole) for whole, _ in sizes],
        "copied by a rank, GiB": [_gib(share) for _, share in sizes],
        f"training stands still, seconds (at {gpu.host / GB:.0f} GB/s)": [_seconds(s / gpu.host) for _, s in sizes],
    }
    title = _row("checkpoint", [job.config.optimizer.name for job in jobs])
    return "\n".join([title, *(_row(f"  {name}", values) for name, values in rows.items())])


def _row(name: str, values: list[str]) -> str:
    return f"{name:<56}" + "".join(f"{value:>20}" for value in values)


def _gib(size: float | None) -> str:
    if not size:
        return "–"
    value = size / GIB
    return f"{value:,.1f}" if value >= 99.95 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _span_seconds(low: float, high: float) -> str:
    return f"{_seconds(low)} to {_seconds(high)}"


def span(low: float, high: float) -> str:
    """Two numbers in two or three digits that mean something."""

    def digits(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"

    if high >= 1000:  # the third digit is as uncertain as the range is wide
        scale = 10 ** (len(str(int(high))) - 3)
        return f"{round(low / scale) * scale:,.0f} to {round(high / scale) * scale:,.0f}"
    return f"{digits(low)} to {digits(high)}"


def machines(job: Job, gpu: Gpu) -> str:
    """The GPUs, in words."""
    nodes = f" ({job.nodes} nodes of {job.gpus_per_node})" if job.nodes > 1 else ""
    return f"{job.ranks} x {gpu.name}{nodes}"


def precision_name(job: Job) -> str:
    """What is computed in."""
    return job.config.model.dtype if job.precision == "no" else f"mixed precision {job.precision}"


def count(number: float) -> str:
    """6738415616 as 6.74 B."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes as 71.5 GiB."""
    return f"{number / GIB:.1f} GiB"
