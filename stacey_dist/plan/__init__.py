"""What a run will take before it is started: `stacey-dist plan`. See docs/plan.md."""

from stacey_dist.plan.memory import Job
from stacey_dist.plan.model import Llama, llama
from stacey_dist.plan.search import search
from stacey_dist.plan.speed import checkpoint_bytes, speed

__all__ = ["Job", "Llama", "checkpoint_bytes", "llama", "search", "speed"]
