"""Extend a run: how its learning rate changes, and the command that keeps it from rising again."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from stacey_dist.checkpoint.manifest import directory_name, step_of
from stacey_dist.training.optimizers import lr_share, scheduled
from stacey_dist.training.settings.config import RunConfig, ScheduleConfig, data_directory

# What changes over the whole run, and the settings that say so.
_OVER_THE_RUN = {"p": "final_p", "alpha": "final_alpha"}


def lr_change(config: RunConfig, saved: Mapping[str, Any], step: int) -> str | None:
    """Return how the learning rate changes after `step` updates; None if it is that of the `saved` settings."""
    known = {setting.name for setting in fields(ScheduleConfig)}
    try:
        schedule = ScheduleConfig(**{name: value for name, value in saved["schedule"].items() if name in known})
        peak, last_step = saved["optimizer"]["lr"], saved["train"]["max_steps"]
        before, expected = (peak * lr_share(each, schedule, last_step) for each in (max(0, step - 1), step))
    except (AttributeError, KeyError, TypeError, ValueError):  # of a version that had other settings
        return None
    after = scheduled(config, step)["lr"]
    if abs(after - expected) <= 1e-5 * max(after, expected):
        return None
    name, max_steps = config.schedule.name, config.train.max_steps
    same = (peak, schedule.name) == (config.optimizer.lr, name) and last_step != max_steps
    reason = f": the {name} is now over {max_steps} updates" if same else ""
    return f"lr {before:.3g} at update {step}, {after:.3g} at update {step + 1}{reason}"


def updates_before_decay(config: RunConfig) -> tuple[int, ...]:
    """Return after how many updates a checkpoint still belongs to a longer run with wsd: those before the decay, or one
    more, as the first update of the decay has the full learning rate. Empty for another schedule.
    """
    last = config.train.max_steps
    before = last - config.schedule.decay_updates(last)
    return (before, before + 1) if config.schedule.name == "wsd" else ()


def checkpoint_before_decay(config: RunConfig, checkpoints: Path) -> Path | None:
    """Return the checkpoint from which a longer run with wsd begins; None if there is none.

    Where the update before the decay was skipped, the checkpoint is saved one update later.
    """
    paths = (checkpoints / directory_name(step) for step in updates_before_decay(config))
    return next((path for path in paths if path.is_dir()), None)


def command_to_continue(config: RunConfig, kept: Path | None) -> str:
    """Return the command that trains a finished run longer without raising its learning rate, and what it does.

    `kept` is the checkpoint from before wsd's decay, if there is one.
    """
    train, schedule = config.train, config.schedule
    if train.epochs is None:
        options = {"train.max_steps": str(2 * train.max_steps)}
    else:
        options = {"train.epochs": f"{2 * train.epochs:g}"}
    longer = f"{config.run_dir.rstrip('/')}-longer"
    share = lr_share(train.max_steps, schedule, train.max_steps)
    has = scheduled(config, 0)  # only what the optimizer has
    finals = [name for name, final in _OVER_THE_RUN.items() if name in has and getattr(schedule, final) is not None]
    constant = {f"schedule.{_OVER_THE_RUN[name]}": "null" for name in finals}
    if kept is not None:
        about = "from before the decay"
        options |= {"run_dir": longer, "checkpoint.resume_from": str(kept)}
        then = scheduled(config, step_of(kept))
        options |= constant | {f"optimizer.{name}": f"{then[name]:.6g}" for name in finals}
    elif schedule.name == "constant" and not finals:
        about = "at the same lr"
    elif share == 0.0:
        about = "from the beginning, for the lr has come down to 0"
        options |= {"run_dir": longer, "checkpoint.resume_from": "null"}
    else:
        at_the_end = scheduled(config, train.max_steps)
        names = ("lr", "adamw_lr", "alpha", "tau", "p")
        numbers = {name: f"{at_the_end[name]:.6g}" for name in names if name in at_the_end}
        about = f"at the last lr, {numbers['lr']}"
        options |= (
            constant | {"schedule.name": "constant"} | {f"optimizer.{name}": value for name, value in numbers.items()}
        )
    if config.checkpoint.resume == "never":
        options["checkpoint.resume"] = "auto"
    cache = getattr(getattr(config, "data", None), "cache_dir", "")
    if cache is None and "run_dir" in options:  # the tokens are in this run's directory
        options["data.cache_dir"] = str(data_directory(config.run_dir))
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.argv[0], "--config", f"{config.run_dir}/config.yaml", *given]
    return f"to continue, {about}: {_launch()} {shlex.join(command)}"


def _launch() -> str:
    """Return the command that has started this run's processes, without the program."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch" + (" --config_file FILE" if processes > 1 else "")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = f" --nnodes {processes // here}" if processes > here else ""
    return f"torchrun{nodes} --nproc_per_node {here}" if processes > 1 else "python"
