"""Check the configuration of `accelerate launch`.

Accelerate passes its configuration to the processes in environment variables, and checks little of it. Its errors and
DeepSpeed's are long tracebacks, some of them after hours of data preparation.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError

TRACEBACK = "STACEY_DIST_TRACEBACK"
"""With this environment variable, errors of Accelerate and DeepSpeed are raised as they are."""

_MIXED_PRECISION = ("no", "bf16", "fp16")
_WRAP_POLICIES = ("TRANSFORMER_BASED_WRAP", "NO_WRAP")
_STATE_DICT_TYPES = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
_TRUTH = ("true", "false", "1", "0", "yes", "no", "on", "off", "y", "n", "t", "f")

# (environment variable, setting of Accelerate's file, what it may be)
_ALLOWED: list[tuple[str, str, Collection[str]]] = [
    ("ACCELERATE_MIXED_PRECISION", "mixed_precision", _MIXED_PRECISION),
    ("FSDP_AUTO_WRAP_POLICY", "fsdp_auto_wrap_policy", _WRAP_POLICIES),
    ("FSDP_STATE_DICT_TYPE", "fsdp_state_dict_type", _STATE_DICT_TYPES),
    ("FSDP_RESHARD_AFTER_FORWARD", "fsdp_reshard_after_forward", _TRUTH),
    ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params", _TRUTH),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading", _TRUTH),
    ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing", _TRUTH),
]
# Errors that a bad setting causes in Accelerate or DeepSpeed.
_CONFIGURATION_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    NotImplementedError,
    OverflowError,
)
_PARALLEL = {"TP": "parallelism_config_tp_size", "CP": "parallelism_config_cp_size", "SP": "parallelism_config_sp_size"}

# DeepSpeed's settings that change how weights or gradients are stored, summed or applied, so that an update would no
# longer be the rule's; and those that the loop would not know of.
_UNSUPPORTED_IN_DEEPSPEED = (
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
_SECTIONS_OF_DEEPSPEED = (
    "bf16",
    "data_types",
    "fp16",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
)
_INSTEAD = {"activation_checkpointing": "use train.gradient_checkpointing", "bfloat16": "its name is bf16"}
# Those without which updates that are not finite are applied, or gradients are not clipped.
_NEEDED_IN_DEEPSPEED = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")


def flag(name: str) -> bool:
    """Return whether an environment variable of Accelerate's says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_environment() -> None:
    """Raise SettingsError for a setting of Accelerate that is not allowed here, by its name in Accelerate's file."""
    fsdp = flag("ACCELERATE_USE_FSDP")
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() not in ("false", "0"):
        refuse("megatron_lm_config", "Megatron-LM", "leave it out")
    for variable, setting, allowed in _ALLOWED:
        value = os.environ.get(variable)
        relevant = fsdp or not variable.startswith("FSDP_")
        if value is not None and relevant and value.upper() not in {choice.upper() for choice in allowed}:
            choices = "true or false" if allowed is _TRUTH else " or ".join(allowed)
            refuse(setting, value, f"it must be {choices}")
    for name, setting in _PARALLEL.items():
        if os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") != "1":
            refuse(setting, os.environ[f"PARALLELISM_CONFIG_{name}_SIZE"], "it must be 1")
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if flag("ACCELERATE_USE_DEEPSPEED") and path != "none":
        _check_json(Path(path))


def check_layer_classes(classes: Callable[[], Collection[str] | None]) -> None:
    """Raise SettingsError where FSDP is to wrap layers of a class that the model does not have.

    Args:
        classes: gives the names of the model's classes, or None where Accelerate looks for them in the built model.
    """
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if named and os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "TRANSFORMER_BASED_WRAP":
        if (known := classes()) is None:
            return
        for name in named.split(","):
            if name not in known:
                refuse("fsdp_transformer_layer_cls_to_wrap", name, f"the model has {', '.join(sorted(known))}")


def check_unsupported(config: dict[str, Any]) -> None:
    """Raise SettingsError for what DeepSpeed's configuration may not ask for here."""
    for name in (*_UNSUPPORTED_IN_DEEPSPEED, *_NEEDED_IN_DEEPSPEED):
        value = deepspeed_setting(config, name)
        if name in _NEEDED_IN_DEEPSPEED:
            wrong = value not in (None, True)
        else:
            wrong = any(value.values()) and value.get("enabled", True) if isinstance(value, dict) else bool(value)
        if wrong:
            instead = _INSTEAD.get(name, "leave it out")
            raise SettingsError(f"{name}: {_short(value)} in the DeepSpeed configuration is not allowed; {instead}")
    for name in ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"):
        if deepspeed_setting(config, name) == "nvme":  # sharding.deepspeed cannot read what lies there
            raise SettingsError(f"{name}: nvme in the DeepSpeed configuration is not allowed; it must be cpu or none")


def deepspeed_setting(config: dict[str, Any], name: str) -> Any:
    """Return what DeepSpeed's configuration has by a name with dots, such as "zero_optimization.stage", or None."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check_with_deepspeed(config: dict[str, Any]) -> None:
    """Raise SettingsError for a configuration that DeepSpeed refuses; it would do so after the data are prepared."""
    from deepspeed.runtime.config import DeepSpeedConfig

    with one_line("the DeepSpeed configuration"):
        DeepSpeedConfig(_without_auto(config))


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without the settings that Accelerate fills in later."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Raise errors that a configuration causes as SettingsErrors of one line that says where it stands.

    `STACEY_DIST_TRACEBACK=1` leaves them as they are.

    Args:
        what: what is at fault, for the message.
    """
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        of_settings = isinstance(error, _CONFIGURATION_ERRORS) or type(error).__name__ == "DeepSpeedConfigError"
        if not of_settings or os.environ.get(TRACEBACK, "0") != "0":
            raise
        raise SettingsError(
            f"{what} is not allowed: {_words(error)}; look at {_source()} ({TRACEBACK}=1 shows where it is refused)"
        ) from error


def refuse(setting: str, value: str, allowed: str) -> NoReturn:
    """Raise the SettingsError for a setting of Accelerate's."""
    raise SettingsError(f"{setting}: {value} is not allowed; {allowed}. It is set by {_source()}")


def _source() -> str:
    """Return which file Accelerate's settings come from, as far as it can be known."""
    files = []
    with_option = ("--config_file", "--config-file")
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        words = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in with_option:
            files.append(value if equals else following)
    deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if deepspeed != "none":
        files.append(deepspeed)
    return " and ".join(files) or "the files and options of `accelerate launch`"


def _words(error: Exception) -> str:
    """Return an error's message in one line; pydantic's with the setting, its value and what is allowed."""
    errors = getattr(error, "errors", None)
    if callable(errors) and (found := errors()):
        first = found[0]
        name = ".".join(str(part) for part in first["loc"])
        return f"{name}: {_short(first.get('input'))}: {first['msg']}"
    lines = str(error).strip().splitlines()
    explains_itself = isinstance(error, (ValueError, AssertionError, ImportError, NotImplementedError))
    return lines[0] if lines and explains_itself else ": ".join([type(error).__name__, *lines[:1]])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_json(path: Path) -> None:
    """Raise SettingsError for a file that is not JSON, repeats a key, holds NaN, or has a section without settings."""
    # JSON is YAML but for its tabs, which no text in it may hold: this finds keys that are given twice, with lines.
    settings = yaml_files.load(yaml_files.read_text(path).replace("\t", " "), str(path))
    try:
        json.loads(yaml_files.read_text(path), parse_constant=_no_number)
    except ValueError as error:
        raise SettingsError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f'{path}: it must hold settings, as in {{"zero_optimization": {{"stage": 2}}}}')
    for section in _SECTIONS_OF_DEEPSPEED:
        value = deepspeed_setting(settings, section)
        if not isinstance(value, dict) and (value is not None or section in settings):
            raise SettingsError(f"{path}: {section}: {_short(value)} is not allowed; it must hold settings")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")
