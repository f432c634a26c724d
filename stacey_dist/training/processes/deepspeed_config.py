"""DeepSpeed's configuration: what it may not ask for here, and what the run's settings put into it."""

import json
import os
from pathlib import Path
from typing import Any

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError
from stacey_dist.training.processes.launch_settings import configuration_errors, short
from stacey_dist.training.run import Run

# DeepSpeed's settings that change how weights or gradients are stored, summed or applied, so that an update would no
# longer be the rule's; and those that the loop would not know of.
_UNSUPPORTED = (
    "activation_checkpointing",
    "amp",
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "bfloat16",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "eigenvalue",
    "elasticity",
    "fp16.fp16_master_weights_and_grads",
    "hybrid_engine",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_gradients",
    "tensor_parallel",
    "torch_autocast",
    "zero_optimization.offload_optimizer.super_offload",
    "zero_optimization.zenflow",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_weights",
)
_SECTIONS = (
    "bf16",
    "data_types",
    "fp16",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
)
_INSTEAD = {"activation_checkpointing": "use train.gradient_checkpointing", "bfloat16": "its name is bf16"}
# Those without which updates that are not finite are applied, or gradients are not clipped.
_NEEDED = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")


def check_file() -> None:
    """Raise SettingsError for a file that is not JSON, repeats a key, holds NaN, or has a section without settings."""
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if str(path) == "none":
        return
    # JSON is YAML but for its tabs, which no text in it may hold: this finds keys that are given twice, with lines.
    text = yaml_files.read_text(path)
    settings = yaml_files.load(text.replace("\t", " "), str(path))
    try:
        json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        raise SettingsError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f'{path}: it must hold settings, as in {{"zero_optimization": {{"stage": 2}}}}')
    for section in _SECTIONS:
        value = _setting(settings, section)
        if not isinstance(value, dict) and (value is not None or section in settings):
            raise SettingsError(f"{path}: {section}: {short(value)} is not allowed; it must hold settings")


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
            f"zero_optimization.stage: {stage} in the DeepSpeed configuration is not allowed; it must be 1, 2 or 3; "
            "to train without sharding, use configs/accelerate/ddp.yaml"
        )
    _check_supported(config)
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


def check_with_deepspeed(config: dict[str, Any]) -> None:
    """Raise SettingsError for a configuration that DeepSpeed refuses; it would do so after the data are prepared."""
    from deepspeed.runtime.config import DeepSpeedConfig

    with configuration_errors("the DeepSpeed configuration"):
        DeepSpeedConfig(_without_auto(config))


def _check_supported(config: dict[str, Any]) -> None:
    """Raise SettingsError for what DeepSpeed's configuration may not ask for here."""
    for name in (*_UNSUPPORTED, *_NEEDED):
        value = _setting(config, name)
        if name in _NEEDED:
            wrong = value not in (None, True)
        else:
            wrong = any(value.values()) and value.get("enabled", True) if isinstance(value, dict) else bool(value)
        if wrong:
            instead = _INSTEAD.get(name, "leave it out")
            raise SettingsError(f"{name}: {short(value)} in the DeepSpeed configuration is not allowed; {instead}")
    for name in ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"):
        if _setting(config, name) == "nvme":  # sharding.deepspeed cannot read what lies there
            raise SettingsError(f"{name}: nvme in the DeepSpeed configuration is not allowed; it must be cpu or none")


def _sum_in_float32(run: Run[Any], config: dict[str, Any], stage: int, accumulation: int) -> None:
    """Have DeepSpeed add micro-batches in float32: in the weights' dtype, small gradients are lost in a large sum.

    ZeRO-1 can do so only in bf16, with another of DeepSpeed's optimizers, which keeps all gradients on each process in
    both dtypes. With an offloaded optimizer, ZeRO-1 and ZeRO-2 ignore the setting and sum in the weights' dtype.
    """
    offloads = _setting(config, "zero_optimization.offload_optimizer.device") not in (None, "none")
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


def _setting(config: dict[str, Any], name: str) -> Any:
    """Return what DeepSpeed's configuration has by a name with dots, such as "zero_optimization.stage", or None."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without the settings that Accelerate fills in later."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")
