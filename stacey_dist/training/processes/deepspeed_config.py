"""Put a run's settings into DeepSpeed's configuration, and refuse one that contradicts them."""

from typing import Any

from stacey_dist.errors import SettingsError
from stacey_dist.training.processes.launch_settings import check_unsupported, deepspeed_setting
from stacey_dist.training.run import Run


def complete(run: Run[Any]) -> None:
    """Put the run's batch sizes, clipping, sums and checks into the DeepSpeed configuration of its accelerator.

    DeepSpeed clips gradients at 1.0 where nothing is said, and takes several settings that belong to the run; a
    file that says the same, or "auto", is fine.

    Raises:
        SettingsError: the configuration has an optimizer, a scheduler or no stage, or contradicts the run's settings.
    """
    config = run.accelerator.state.deepspeed_plugin.deepspeed_config
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise SettingsError(
                f"{section}: this section of the DeepSpeed configuration is not allowed; "
                f"{section}.* of the run takes its place ({section}.name and so on)"
            )
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise SettingsError(
            f"zero_optimization.stage: {stage} in the DeepSpeed configuration is not allowed; it must be 1, 2 or 3, "
            "and configs/accelerate/ddp.yaml shards nothing"
        )
    check_unsupported(config)
    if run.config.weights_dtype != "float32":
        raise SettingsError(
            f"model.dtype: {run.config.weights_dtype} is not allowed with DeepSpeed, which keeps float32 master "
            "weights; use float32, with train.mixed_precision bf16"
        )
    asked, found = run.config.train.mixed_precision, run.accelerator.mixed_precision
    if asked not in (None, found):
        raise SettingsError(
            f"train.mixed_precision: {asked} is contradicted by the DeepSpeed configuration, whose bf16 and fp16 give "
            f'{found}; leave them out or write "enabled": "auto"'
        )
    if config.get("fp16", {}).get("enabled"):
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise SettingsError(
                f"train.mixed_precision: fp16 is not allowed with DeepSpeed on this {run.accelerator.device.type}, "
                "which DeepSpeed takes to have no fp16; use bf16"
            )
    accumulation = run.process_batch_size // run.micro_batch_size
    _set(config, "gradient_clipping", run.config.train.max_grad_norm, "train.max_grad_norm")
    _set(config, "train_micro_batch_size_per_gpu", run.micro_batch_size, "train.micro_batch_size")
    _set(config, "gradient_accumulation_steps", accumulation, "train.global_batch_size and train.micro_batch_size")
    _set(config, "train_batch_size", run.config.train.global_batch_size, "train.global_batch_size")
    if config.get("bf16", {}).get("enabled"):
        config["bf16"].setdefault("check_grad_overflow", True)  # skip an update that is not finite, as everywhere
    if found != "no":
        _sum_in_float32(run, config, stage, accumulation)
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading would exchange the optimizer for CPUAdam
    run.accelerator.gradient_accumulation_steps = accumulation


def _sum_in_float32(run: Run[Any], config: dict[str, Any], stage: int, accumulation: int) -> None:
    """Have DeepSpeed add micro-batches in float32: in the weights' dtype, small gradients are lost in a large sum.

    ZeRO-1 can do so only in bf16, with another of DeepSpeed's optimizers, which keeps all gradients on each process in
    both dtypes. With an offloaded optimizer, ZeRO-1 and ZeRO-2 ignore the setting and sum in the weights' dtype.
    """
    offloads = deepspeed_setting(config, "zero_optimization.offload_optimizer.device") not in (None, "none")
    types = config.setdefault("data_types", {})
    if stage == 3 or (stage == 2 and not offloads):
        types.setdefault("grad_accum_dtype", "fp32")
    elif accumulation > 1 and types.get("grad_accum_dtype") is None:
        run.say(
            f"ZeRO-{stage} adds the {accumulation} micro-batches of an update in {run.accelerator.mixed_precision}; "
            "configs/accelerate/zero2.yaml and zero3.yaml add them in float32"
        )


def _set(config: dict[str, Any], key: str, value: float, setting: str) -> None:
    said = config.get(key, "auto")
    # Accelerate writes 1 for the accumulation that nobody has set.
    by_default = key == "gradient_accumulation_steps" and said == 1
    if said not in ("auto", value) and not by_default:
        raise SettingsError(
            f"{key}: {said} in the DeepSpeed configuration contradicts {setting}, which gives {value}; "
            'leave it out or write "auto"'
        )
    config[key] = value
