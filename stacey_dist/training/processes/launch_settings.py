"""Check the configuration of `accelerate launch`.

Accelerate passes its configuration to the processes in environment variables, and checks little of it. Its errors and
DeepSpeed's are long tracebacks, some of them after hours of data preparation.
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, NoReturn

import psutil

from stacey_dist.errors import SettingsError, first_line, one_line

TRACEBACK = "STACEY_DIST_TRACEBACK"
"""With this environment variable, errors of Accelerate and DeepSpeed are raised as they are."""

_TRUTH = ("true", "false", "1", "0", "yes", "no", "on", "off", "y", "n", "t", "f")
# What Accelerate's settings may be, by their environment variables.
_ALLOWED: dict[str, Collection[str]] = {
    "ACCELERATE_MIXED_PRECISION": ("no", "bf16", "fp16"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "NO_WRAP"),
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "FSDP_RESHARD_AFTER_FORWARD": _TRUTH,
    "FSDP_OFFLOAD_PARAMS": _TRUTH,
    "FSDP_CPU_RAM_EFFICIENT_LOADING": _TRUTH,
    "FSDP_ACTIVATION_CHECKPOINTING": _TRUTH,
    "PARALLELISM_CONFIG_TP_SIZE": ("1",),
    "PARALLELISM_CONFIG_CP_SIZE": ("1",),
    "PARALLELISM_CONFIG_SP_SIZE": ("1",),
}
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


def flag(name: str) -> bool:
    """Return whether an environment variable of Accelerate's says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_environment() -> None:
    """Raise SettingsError for a setting of Accelerate that is not allowed here, by its name in Accelerate's file."""
    fsdp = flag("ACCELERATE_USE_FSDP")
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() not in ("false", "0"):
        refuse("megatron_lm_config", "Megatron-LM", "leave it out")
    for variable, allowed in _ALLOWED.items():
        value = os.environ.get(variable)
        relevant = fsdp or not variable.startswith("FSDP_")
        if value is not None and relevant and value.upper() not in {choice.upper() for choice in allowed}:
            choices = "true or false" if allowed is _TRUTH else " or ".join(allowed)
            refuse(variable.removeprefix("ACCELERATE_").lower(), value, f"it must be {choices}")


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


@contextmanager
def configuration_errors(what: str) -> Iterator[None]:
    """Raise errors that the configuration `what` causes as SettingsErrors of one line that says where it stands.

    `STACEY_DIST_TRACEBACK=1` leaves them as they are.
    """
    try:
        yield
    except Exception as error:
        of_settings = isinstance(error, _CONFIGURATION_ERRORS) or type(error).__name__ == "DeepSpeedConfigError"
        if isinstance(error, SettingsError) or not of_settings or os.environ.get(TRACEBACK, "0") != "0":
            raise
        raise SettingsError(
            f"{what} is not allowed: {_words(error)}; look at {_source()} ({TRACEBACK}=1 shows where it is refused)"
        ) from error


def refuse(setting: str, value: str, allowed: str) -> NoReturn:
    """Raise the SettingsError for a setting of Accelerate's."""
    raise SettingsError(f"{setting}: {value} is not allowed; {allowed}. It is set by {_source()}")


def _source() -> str:
    """Return which file Accelerate's settings come from, as far as it can be known."""
    files, words = [], []
    with suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in ("--config_file", "--config-file"):
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
        return f"{name}: {short(first.get('input'))}: {first['msg']}"
    explains_itself = isinstance(error, (ValueError, AssertionError, ImportError, NotImplementedError))
    return first_line(error) if explains_itself else one_line(error)


def short(value: Any) -> str:
    """Return a value for a message."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
