"""The parts of the launchers, and the names with which you train a model and data of your own.

`Launcher` describes a training program and `Parts` what it builds, `Task` is what it trains on, `Engine` makes one
update on DDP, ZeRO or FSDP2, and `train` is the loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stacey_dist.training.engine import Engine
    from stacey_dist.training.launchers import Launcher, Parts
    from stacey_dist.training.loop import train
    from stacey_dist.training.task import Task

__all__ = ["Engine", "Launcher", "Parts", "Task", "train"]

_HOMES = {"Engine": "engine", "Launcher": "launchers", "Parts": "launchers", "Task": "task", "train": "loop"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the loop takes seconds, and a reader of settings needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
