"""Engine, micro-batch and gradient checkpointing for a model, a global batch and a number of GPUs."""

from dataclasses import dataclass, replace

from stacey_dist.errors import SettingsError
from stacey_dist.plan.engines import ENGINES
from stacey_dist.plan.hardware import Gpu
from stacey_dist.plan.memory import Job
from stacey_dist.plan.speed import Speed, speed


@dataclass(frozen=True)
class Proposal:
    """A job that fits, and how fast it would be."""

    job: Job
    speed: Speed


def search(job: Job, gpu: Gpu, memory: float, efficiency: tuple[float, float]) -> list[Proposal]:
    """The fastest way on each engine that fits into `memory` bytes a GPU, with and without gradient checkpointing.

    The micro-batch is the fastest of those that divide the global batch; of equally fast ones the largest. Fastest
    first, by the slow end of the range, which counts communication that is not hidden; then the least memory.
    """
    share = job.config.train.global_batch_size // job.ranks
    divisors = [micro for micro in range(1, share + 1) if share % micro == 0]
    found = []
    for engine in ENGINES:
        try:
            candidate = replace(job, engine=engine)
        except SettingsError:  # single on several GPUs, hsdp on one node, a dtype that DeepSpeed does not take
            continue
        for checkpointing in (False, True):
            jobs = [candidate.with_batch(micro, checkpointing=checkpointing) for micro in divisors]
            fitting = [Proposal(j, speed(j, gpu, efficiency)) for j in jobs if j.peak <= memory]
            if fitting:
                found.append(min(fitting, key=lambda p: (round(p.speed.slow, 9), -p.job.micro_batch)))
    return sorted(found, key=lambda p: (round(p.speed.slow, 3), p.job.peak))
