"""W&B's sweep files, which Optuna searches here: one file states the ranges for both.

Of W&B's format this reads `program`, `command` (the configuration and further options of the launcher), `metric`, and
`parameters` with

    value: V                                                one value
    values: [V, ...]                                        a choice
    min: A, max: B                                          between them; whole numbers if both are
    min: A, max: B, distribution: log_uniform_values        the same, even in the logarithm
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import LAUNCHERS

INFINITY = ".inf"
"""How YAML and the launchers' options write it, and how it is kept here: JSON has none."""

_KEYS = ("program", "method", "metric", "parameters", "command", "name", "description", "project", "entity")
_FORMS = {
    "value": ({"value"}, ("constant",)),
    "values": ({"values"}, ("categorical",)),
    "range": ({"min", "max"}, ("uniform", "int_uniform", "log_uniform_values")),
}
"""W&B's forms of a parameter: their keys, and the distributions that go with them."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`."""

    low: float
    high: float
    log: bool
    whole: bool


Space = Mapping[str, Range | list[Any]]
"""What is searched, by the names of the launcher's options: a range or a choice."""


@dataclass(frozen=True)
class Sweep:
    """A search, as its file states it.

    Args:
        program: the launcher.
        config: the YAML file of the runs.
        metric: a held-out figure, as in metrics.jsonl.
        maximize: whether more of it is better.
        fixed: settings that every run has.
        space: settings that are searched.
    """

    program: str
    config: Path
    metric: str
    maximize: bool
    fixed: Mapping[str, Any]
    space: Space


def read_sweep(file: Path) -> Sweep:
    """Read a sweep file; the configuration that its command names is found from the file's checkout or from here.

    Raises:
        SettingsError: the file cannot be read, or asks for what this does not know.
    """
    content = yaml_files.read(file)
    try:
        program, command, metric = content["program"], [str(word) for word in content["command"]], content["metric"]
        name, goal, parameters = metric["name"], metric.get("goal", "minimize"), dict(content["parameters"])
        config = command[command.index("--config") + 1]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        wanted = "program, a command with --config FILE, metric with a name, and parameters"
        raise SettingsError(f"{file}: it must hold {wanted}, as W&B's sweep files do ({error!r})") from error
    if sum(word.partition("=")[0] == "--config" for word in command) > 1:
        raise SettingsError(
            f"{file}: command: it has several --config, which is not known here; write one file of them"
        )
    if program not in LAUNCHERS:
        raise SettingsError(f"{file}: program: {program} is not allowed; it must be {' or '.join(LAUNCHERS)}")
    for key in metric.keys() - {"name", "goal"}:
        raise SettingsError(f"{file}: metric.{key}: {metric[key]} is not known here; a metric has a name and a goal")
    for key in content.keys() - set(_KEYS):
        raise SettingsError(f"{file}: {key}: {content[key]} is not known here; there may be {', '.join(_KEYS)}")
    if (method := content.get("method", "bayes")) != "bayes":
        raise SettingsError(f"{file}: method: {method} is not allowed; it must be bayes")
    metrics = LAUNCHERS[program].metrics
    if name not in metrics:
        raise SettingsError(
            f"{file}: metric.name: {name} is not allowed; it must be {' or '.join(metrics)} for {program}"
        )
    if goal not in ("minimize", "maximize"):
        raise SettingsError(f"{file}: metric.goal: {goal} is not allowed; it must be minimize or maximize")
    fixed = _options(file, program, command)
    space: dict[str, Range | list[Any]] = {}
    for setting, description in parameters.items():
        where = f"{file}: {setting}"
        form = _form(where, description)
        if form == "value":
            fixed[setting] = _without_infinity(description["value"])
        else:
            space[setting] = _choices(where, description) if form == "values" else _range(where, description)
    return Sweep(program, _find(file, config), name, goal == "maximize", fixed, space)


def _options(file: Path, program: str, command: list[str]) -> dict[str, Any]:
    """Return the launcher's options in a command, settings of every run, without the configuration and W&B's own."""
    options: dict[str, Any] = {}
    # What stands before the launcher is how it is started; it may be named itself, too.
    first = next(
        (i + 1 for i, word in enumerate(command) if word in ("${program}", program)), command.index("--config")
    )
    words = iter(command[first:])
    for word in words:
        if word == "${args}":
            continue
        name, given, text = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise SettingsError(f"{file}: command: {word} is not known here; after {program} there may be options")
        value = text if given else next(words, "")
        if name != "config" and not name.startswith("tracking."):
            options[name] = _without_infinity(yaml_files.load(value, f"{file}: command: --{name} {value}"))
    return options


def _form(where: str, description: Any) -> str:
    """Return which of W&B's forms a parameter has: value, values or range; raise SettingsError for a mixture."""
    if isinstance(description, dict):
        given, distribution = description.keys() - {"distribution"}, description.get("distribution")
        for form, (keys, distributions) in _FORMS.items():
            if given == keys:
                if distribution is None or distribution in distributions:
                    return form
                names = " and ".join(sorted(keys, reverse=True))
                raise SettingsError(
                    f"{where}: distribution: {distribution} does not go with {names}; it may be "
                    f"{', '.join(distributions)}"
                )
    raise SettingsError(f"{where}: {description} is not allowed; it must have value, values, or min and max")


def _choices(where: str, description: dict[str, Any]) -> list[Any]:
    values = description["values"]
    if not isinstance(values, list) or not values:
        raise SettingsError(f"{where}: values: {values!r} is not allowed; it must be a list")
    return [_without_infinity(value) for value in values]


def _range(where: str, description: dict[str, Any]) -> Range:
    distribution = description.get("distribution")
    low: Any = description.get("min")
    high: Any = description.get("max")
    if any(type(bound) not in (int, float) or not math.isfinite(bound) for bound in (low, high)) or low >= high:
        raise SettingsError(
            f"{where}: min {low!r}, max {high!r} are not allowed; they must be finite numbers, min below max"
        )
    log = distribution == "log_uniform_values"
    if log and low <= 0:
        raise SettingsError(f"{where}: min {low} is not allowed; it must be above 0 for log_uniform_values")
    whole = isinstance(low, int) and isinstance(high, int) and distribution in (None, "int_uniform")
    if distribution == "int_uniform" and not whole:
        raise SettingsError(f"{where}: distribution: {distribution} does not go with min {low} and max {high}")
    return Range(low, high, log, whole)


def _without_infinity(value: Any) -> Any:
    return INFINITY if value == math.inf else value


def _find(file: Path, config: str) -> Path:
    """Find a path in a command, which is relative to the checkout, as for `wandb agent`, which is started there."""
    for directory in (*file.resolve().parents, Path.cwd()):
        if (directory / config).is_file():
            return directory / config
    raise SettingsError(f"{file}: command: --config {config} is neither in a directory above the file nor here")
