"""Memory, communication and time of a run before it is started: `stacey-dist plan`. See docs/how-to/plan.md."""

from stacey_dist.plan.job import Job
from stacey_dist.plan.model import Model, planned_model
from stacey_dist.plan.plans import Plan, make_plan, propose_plans
from stacey_dist.plan.speed import checkpoint_bytes

__all__ = ["Job", "Model", "Plan", "checkpoint_bytes", "make_plan", "planned_model", "propose_plans"]
