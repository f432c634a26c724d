"""Join the processes on the engine that `accelerate launch` was configured with."""

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn

from stacey_dist.errors import SettingsError
from stacey_dist.training.processes import deepspeed_config, launch_settings, rendezvous
from stacey_dist.training.settings.config import RunConfig

ZERO_REDUNDANCY = "zero_redundancy"


def requested_engine() -> str:
    """Return the engine that the launch asked for: single, ddp, zero_redundancy, deepspeed or fsdp2.

    Accelerate's configuration files know no ZeroRedundancyOptimizer; ours name it in torchrun's `role`, which the
    processes find in ROLE_NAME.

    Raises SettingsError for FSDP's first version.
    """
    if launch_settings.flag("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    if launch_settings.flag("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise SettingsError(f"fsdp_version: {version} is not allowed in Accelerate's fsdp_config; it must be 2")
        return "fsdp2"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return "single"
    return ZERO_REDUNDANCY if os.environ.get("ROLE_NAME") == ZERO_REDUNDANCY else "ddp"


def start_accelerator(config: RunConfig) -> Accelerator:
    """Join the processes on the engine that the launch asked for.

    Raises SettingsError if Accelerate brings up another engine or another number of processes.
    """
    requested = requested_engine()
    launch_settings.check_environment()
    if requested == "deepspeed":
        deepspeed_config.check_file()
    # Without cpu=True, processes that find no GPU would not join each other. A Mac's GPU has no float64.
    # torch 2.6 has no `check_available`.
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_cpu = launch_settings.flag("ACCELERATE_USE_CPU") or device is None or device.type == "mps"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        _check_devices()
    # Accelerate drops a timeout that equals its own default for NCCL, and gloo's is another.
    patience = timedelta(seconds=config.train.collective_timeout_seconds, milliseconds=1)
    joining: dict[str, Any] = {"timeout": patience, "init_method": rendezvous.ATTEMPT}
    if requested == "fsdp2" and on_cpu:
        # Accelerate uses FSDP on GPUs only, though `fully_shard` works on CPUs as well.
        PartialState(cpu=True, **joining).distributed_type = DistributedType.MULTI_GPU
    if requested == "deepspeed" and on_cpu:
        joining["backend"] = "gloo"
    # DeepSpeed and Accelerate use names that torch 2.13 deprecates: hundreds of warnings between the progress lines.
    warnings.filterwarnings("ignore", r"`(torch\.distributed\.\w+|broadcast_buffers)` is deprecated", FutureWarning)
    # The buffers are shared when they are looked at (`Engine.broadcast_buffers`), not in every forward pass.
    handlers = [InitProcessGroupKwargs(**joining), DistributedDataParallelKwargs(broadcast_buffers=False)]
    with launch_settings.configuration_errors("the configuration of `accelerate launch`"):
        if requested == "deepspeed" and on_cpu:
            skip_compilation()
        accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision,
            cpu=on_cpu and requested != "deepspeed",  # with cpu=True, Accelerate does not use DeepSpeed
            kwargs_handlers=handlers,
            log_with=list(config.tracking.trackers) or None,
            project_dir=config.run_dir,
        )
    if requested != "deepspeed":  # the environment may hold another number, and losses are scaled in the loop
        accelerator.gradient_accumulation_steps = 1
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and requested != "deepspeed":
        # Accelerate ignores fp16 on CPUs; torch has both the autocast and the scaler there.
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    _check_engine(requested, accelerator)
    return accelerator


def skip_compilation() -> None:
    """Keep DeepSpeed from compiling its operations for CPUs, which takes a minute: its inference alone uses them.

    A killed compiler would also leave a lock in torch's extensions cache, for which every later run waits forever.
    """
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def shards_weights(accelerator: Accelerator) -> bool:
    """Return whether each process keeps a share of every weight, as under ZeRO-3 and FSDP2."""
    if requested_engine() == "deepspeed":
        return bool(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 3)
    return requested_engine() == "fsdp2"


def loads_weights_from_rank0(accelerator: Accelerator, model: nn.Module) -> bool:
    """Return whether the engine sends each process its share of the weights that rank 0 has, whatever it has itself.

    Accelerate's FSDP2 cannot where buffers are in the state dict: there every process needs the weights.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return shards_weights(accelerator) and (requested_engine() == "deepspeed" or model.state_dict().keys() <= names)


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Return the dtype of the weights that DeepSpeed's forward pass takes; None on other engines, which cast none."""
    if requested_engine() != "deepspeed":
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def _check_devices() -> None:
    """Raise SettingsError for more processes than GPUs: NCCL would fail in the first collective."""
    here, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if here > found:
        raise SettingsError(
            f"accelerate launch --num_processes: {here} processes on this machine are not allowed; torch sees {found} "
            f"GPU{'s' if found != 1 else ''} on it, and each process needs one"
        )


def _check_engine(requested: str, accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    hint = "look at the --config_file of `accelerate launch`"
    if accelerator.num_processes != launched:
        raise SettingsError(
            f"{launched} processes were launched, but Accelerate joined {accelerator.num_processes}; {hint}"
        )
    kind = accelerator.distributed_type
    expected = {"deepspeed": DistributedType.DEEPSPEED, "fsdp2": DistributedType.FSDP}.get(requested)
    others = [DistributedType.DEEPSPEED, DistributedType.FSDP] + [DistributedType.NO] * (launched > 1)
    if kind in others if expected is None else kind != expected:
        raise SettingsError(f"{requested} was asked for, but Accelerate came up with {kind.value}; {hint}")


def describe_engine(accelerator: Accelerator) -> str:
    """Return how processes share the work, as text: " with DeepSpeed ZeRO-2", " with FSDP2", "" for one process."""
    name = requested_engine()
    if name == "deepspeed":
        stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        return f" with DeepSpeed ZeRO-{stage}"
    parallelism = accelerator.parallelism_config
    fsdp = "HSDP" if parallelism is not None and parallelism.dp_replicate_size > 1 else "FSDP2"
    names = {"fsdp2": fsdp, "ddp": "DDP", ZERO_REDUNDANCY: "DDP and ZeroRedundancyOptimizer"}
    return f" with {names[name]}" if name in names else ""
