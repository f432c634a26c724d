"""Experiment trackers: wandb and TensorBoard, through Accelerate."""

import os
from typing import Any

from stacey_dist.training.run import Run
from stacey_dist.training.settings.command_line import flatten, to_dict


def start_trackers(run: Run[Any]) -> None:
    """Start the trackers that the settings name; wandb resumes the run it knows. All processes call it together."""
    tracking, accelerator = run.config.tracking, run.accelerator
    if not tracking.trackers:
        return
    wandb_settings = {"name": tracking.run_name or run.directory.name, "dir": str(run.directory)}
    if "wandb" in run.tracker_ids:
        wandb_settings |= {"id": run.tracker_ids["wandb"], "resume": "allow"}
    if "wandb" in tracking.trackers and "WANDB_MODE" not in os.environ and not _logged_in_to_wandb():
        wandb_settings["mode"] = "offline"
        run.say("wandb: not logged in, so the run is kept offline; `wandb sync` uploads it")
    settings = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in flatten(to_dict(run.config)).items()
    }
    accelerator.init_trackers(
        tracking.project,
        config=settings,
        init_kwargs={"wandb": wandb_settings},
    )
    if "wandb" in tracking.trackers and accelerator.is_main_process:
        run.tracker_ids = {"wandb": accelerator.get_tracker("wandb", unwrap=True).id}


def log(run: Run[Any], row: dict[str, Any]) -> None:
    """Log a row to the trackers, if there are any. All processes call it together."""
    if run.accelerator.trackers:
        run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def _logged_in_to_wandb() -> bool:
    import wandb

    return bool(wandb.login(prompt=False))
