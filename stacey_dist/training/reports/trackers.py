"""Experiment trackers: wandb and TensorBoard, through Accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stacey_dist.errors import one_line
from stacey_dist.training.run import Run
from stacey_dist.training.settings.command_line import flatten, to_dict


def start_trackers(run: Run[Any], step: int) -> None:
    """Start the trackers that the settings name; wandb resumes the run it knows. All processes call it together.

    TensorBoard hides the updates after `step`, which a run that was killed has left.
    """
    tracking, accelerator = run.config.tracking, run.accelerator
    if not tracking.trackers or accelerator.trackers:  # a program may train on
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
    """Log a row to the trackers, if there are any. One that fails is left out from then on."""
    for tracker in list(run.accelerator.trackers):
        with _failures_reported(run, tracker):
            if tracker.name == "wandb":
                tracker.log(row)
            else:
                tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def close_trackers(run: Run[Any]) -> None:
    """Have the trackers write what they have not written yet."""
    for tracker in list(run.accelerator.trackers):
        with _failures_reported(run, tracker, "could not finish"):
            tracker.finish()
    run.accelerator.trackers.clear()


@contextmanager
def _failures_reported(
    run: Run[Any], tracker: Any, what: str = "failed and gets no more rows, training continues"
) -> Iterator[None]:
    """Report a tracker's error and drop the tracker: a run must not end because a service or a disk fails."""
    try:
        yield
    except Exception as error:  # each tracker has its own
        run.accelerator.trackers.remove(tracker)
        run.say(f"{tracker.name} {what}: {one_line(error)}")
