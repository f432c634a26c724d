"""Start a run: join the processes, and check the launch and the settings against each other."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed

from stacey_dist.errors import SettingsError
from stacey_dist.training.export import check_upload
from stacey_dist.training.processes import deepspeed_config, heartbeat, launch_settings, open_files
from stacey_dist.training.processes.devices import cpu_threads, device_name
from stacey_dist.training.processes.launch import describe_engine, requested_engine, start_accelerator
from stacey_dist.training.run import C, Run
from stacey_dist.training.settings.config import RunConfig


def start(config: C) -> Run[C]:
    """Join the processes and prepare the run directory for a checked configuration.

    Raises SettingsError if what the launch or its DeepSpeed configuration asks for is not available.
    """
    transformers.utils.logging.disable_progress_bar()
    separate_runs_of_a_sweep(config)
    open_files.raise_limits(int(os.environ.get("WORLD_SIZE", "1")), config.train.heartbeat_timeout_seconds is not None)
    accelerator = start_accelerator(config)
    heartbeat.start(config.train.heartbeat_timeout_seconds)
    torch.set_num_threads(config.train.cpu_threads or cpu_threads())  # on a GPU, for offloaded updates
    set_seed(config.seed)
    run = Run(config, accelerator)
    run.call_on_main(lambda: check_upload(config.hub))
    _check_precision(run)
    if requested_engine() == "deepspeed":
        deepspeed_config.complete(run)
        deepspeed_config.check_with_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
    elif requested_engine() == "fsdp2":
        launch_settings.check_layer_classes(config.layer_classes)
    processes, mixed = accelerator.num_processes, accelerator.mixed_precision
    arithmetic = config.weights_dtype if mixed == "no" else f"mixed precision {mixed}"
    run.say(
        f"{processes} process{'es' if processes > 1 else ''} on {device_name(accelerator.device)}"
        f"{describe_engine(accelerator)}, "
        f"{arithmetic}, "
        f"{config.train.global_batch_size} {config.samples} an update"
    )
    return run


def _check_precision(run: Run[Any]) -> None:
    """Raise SettingsError where weights that are not float32 do not go with the mixed precision that came up.

    It is `accelerate launch`'s where the run does not say.
    """
    mixed = run.accelerator.mixed_precision
    if run.config.weights_dtype == "float32" or mixed == "no":
        return
    if mixed == "fp16" or requested_engine() == "fsdp2":  # Accelerate would make FSDP2's weights float32
        raise SettingsError(
            f"model.dtype: {run.config.weights_dtype} is not allowed with mixed precision {mixed} on this engine; use "
            "float32, or --train.mixed_precision no"
        )


def separate_runs_of_a_sweep(config: RunConfig) -> None:
    """Give a run of `wandb agent`, which starts many of one configuration, a run_dir of its own.

    No run may resume from the checkpoint of another, and trackers write their files to run_dir.
    """
    if sweep := os.environ.get("WANDB_SWEEP_ID"):
        config.run_dir = str(Path(config.run_dir) / f"sweep-{sweep}" / os.environ.get("WANDB_RUN_ID", "run"))
