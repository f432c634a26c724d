"""Memory, communication and time of a run before it is started: `stacey-dist plan`. See docs/how-to/plan.md."""

from stacey_dist.plan.job import Job
from stacey_dist.plan.model import Llama, llama
from stacey_dist.plan.plans import Plan, make_plan, propose_plans
from stacey_dist.plan.speed import checkpoint_bytes

__all__ = ["Job", "Llama", "Plan", "checkpoint_bytes", "llama", "make_plan", "propose_plans"]
