"""The launchers' training loop, and its API for your own model and data.

`Launcher` describes a training program, `Parts` builds its model and data, `Task` has its data and loss, `Engine` makes
one update on DDP, ZeRO or FSDP2, `train` is the loop, and a `Callback` observes it. `docs/how-to/programs.md` has a
complete program. For a loop of your own, use `Launcher.build(config).engine`; see `Engine`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stacey_dist.training.callbacks import Callback, Training
    from stacey_dist.training.engine import Engine
    from stacey_dist.training.launchers import IMAGES, LLM, BuiltRun, Launcher, Parts
    from stacey_dist.training.loop import train
    from stacey_dist.training.reports.rows import read_rows
    from stacey_dist.training.run import Run
    from stacey_dist.training.settings.config import RunConfig
    from stacey_dist.training.task import DatasetTask, Task

__all__ = [
    "IMAGES",
    "LLM",
    "BuiltRun",
    "Callback",
    "DatasetTask",
    "Engine",
    "Launcher",
    "Parts",
    "Run",
    "RunConfig",
    "Task",
    "Training",
    "read_rows",
    "train",
]

_HOMES = {
    "callbacks": ("Callback", "Training"),
    "settings.config": ("RunConfig",),
    "engine": ("Engine",),
    "launchers": ("IMAGES", "LLM", "BuiltRun", "Launcher", "Parts"),
    "loop": ("train",),
    "reports.rows": ("read_rows",),
    "run": ("Run",),
    "task": ("DatasetTask", "Task"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the loop takes seconds, and a reader of settings needs none of it."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
