"""Experiment trackers: wandb and TensorBoard, through Accelerate."""

import os
from typing import Any

from stacey_dist.training.run import Run
from stacey_dist.training.settings.command_line import flatten, to_dict


def start_trackers(run: Run[Any], step: int) -> None:
    """Start the trackers that the settings name; wandb resumes the run it knows. All processes call it together.

    Args:
        run: the run.
        step: the updates it has. TensorBoard hides later ones, which a run that was killed has left.
    """
    tracking, accelerator = run.config.tracking, run.accelerator
    if not tracking.trackers:
        return
    wandb_settings = {"name": tracking.run_name or run.directory.name, "dir": str(run.directory)}
    if "wandb" in run.tracker_ids:
        wandb_settings |= {"id": run.tracker_ids["wandb"], "resume": "allow"}
    if "wandb" in tracking.trackers and "WANDB_MODE" not in os.environ:
        import wandb

        if not wandb.login(prompt=False):
            wandb_settings["mode"] = "offline"
            run.say("wandb: not logged in, so the run is kept offline; `wandb sync` uploads it")
    settings = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in flatten(to_dict(run.config)).items()
    }
    accelerator.init_trackers(
        tracking.project,
        config=settings,
        init_kwargs={"wandb": wandb_settings, "tensorboard": {"purge_step": step + 1}},
    )
    if "wandb" in tracking.trackers and accelerator.is_main_process:
        tracker = accelerator.get_tracker("wandb", unwrap=True)
        tracker.define_metric("*", step_metric="step")  # wandb's own steps only grow: it would drop updates made again
        run.tracker_ids = {"wandb": tracker.id}


def log(run: Run[Any], row: dict[str, Any]) -> None:
    """Log a row to the trackers, if there are any. All processes call it together."""
    for tracker in run.accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log(row)
        else:
            tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
