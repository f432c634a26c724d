"""The plan of a job: its memory and its speed; and the plans that a search proposes."""

import json
from dataclasses import dataclass, replace

from stacey_dist.errors import SettingsError
from stacey_dist.plan.activations import Activations, activations
from stacey_dist.plan.hardware import Gpu
from stacey_dist.plan.job import Job
from stacey_dist.plan.memory import ENGINES, RankMemory, most_loaded_rank
from stacey_dist.plan.speed import Speed, estimate_speed
from stacey_dist.training.settings.config import Checkpointing


@dataclass(frozen=True)
class Plan:
    """A job, and what it takes.

    Attributes:
        job: the job.
        rank: the rank that keeps most.
        memory: what that rank keeps.
        activations: of a micro-batch.
        speed: how long an update takes.
    """

    job: Job
    rank: int
    memory: RankMemory
    activations: Activations
    speed: Speed

    @property
    def peak(self) -> int:
        """Bytes on the rank's GPU at most."""
        return self.memory.peak(self.activations)


def make_plan(job: Job, gpu: Gpu) -> Plan:
    """Return the plan of a job on a GPU."""
    rank, memory = most_loaded_rank(job)
    return Plan(job, rank, memory, _activations(job), estimate_speed(job, memory, gpu))


def propose_plans(job: Job, gpu: Gpu, room: float) -> list[Plan]:
    """Return the fastest plan on each engine that fits into `room` bytes a GPU, for each kind of checkpointing.

    The micro-batch is the fastest of those that divide the global batch; of equally fast ones the largest. Fastest
    first, by the slow end of the range, which counts communication that is not hidden; then the least memory.
    """
    divisors = [micro for micro in range(1, job.rank_batch + 1) if job.rank_batch % micro == 0]
    found = []
    for engine in ENGINES:
        try:
            candidate = replace(job, engine=engine)
        except SettingsError:  # single on several GPUs, hsdp on one node, a dtype that DeepSpeed does not take
            continue
        kinds: tuple[Checkpointing, ...] = (False, "selective", True)
        for checkpointing in kinds:
            jobs = [candidate.with_batch(micro, checkpointing=checkpointing) for micro in divisors]
            fitting = [plan for plan in (make_plan(job, gpu) for job in jobs) if plan.peak <= room]
            if fitting:
                found.append(min(fitting, key=lambda plan: (round(plan.speed.slow, 9), -plan.job.micro_batch)))
    # To three digits: what is as fast is ordered by its memory.
    return sorted(found, key=lambda plan: (float(f"{plan.speed.slow:.3g}"), plan.peak))


def peak_bytes(job: Job) -> int:
    """Return the bytes on the most loaded rank's GPU at most: in forward and backward, or in the update."""
    _, memory = most_loaded_rank(job)
    return memory.peak(_activations(job))


def largest_micro_batch(job: Job, room: float) -> int:
    """Return the largest micro-batch, of any global batch, whose peak is within `room` bytes, in sequences; or 0."""

    def fits(micro: int) -> bool:
        return peak_bytes(job.with_batch(micro, batch=2 * micro * job.ranks)) <= room

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _activations(job: Job) -> Activations:
    checkpointing, how = job.config.train.gradient_checkpointing, (job.config.data.sequence_length, job.arithmetic)
    if job.model.of_numbers:
        return activations(json.loads(job.model.described), job.micro_batch, *how, checkpointing=checkpointing)
    from stacey_dist.plan.measured import measured

    return measured(job.model.described, job.micro_batch, *how, checkpointing=checkpointing)
