"""Types of settings with their allowed values, and the check of a configuration against them.

They are `Annotated` types, not jsonargparse's. So values stay plain numbers, which YAML and JSON can hold, and values
that a program assigns are checked too.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from stacey_dist.errors import SettingsError


@dataclass(frozen=True, repr=False)
class Allowed:
    """A condition on a value, besides its type.

    Args:
        words: completes "it must be".
        holds: Return whether a value is so.
    """

    words: str
    holds: Callable[[Any], bool] = field(compare=False)

    def __repr__(self) -> str:
        return self.words


PositiveInt = Annotated[int, Allowed("> 0", lambda value: value > 0)]
NonNegativeInt = Annotated[int, Allowed(">= 0", lambda value: value >= 0)]
AtLeastTwo = Annotated[int, Allowed(">= 2", lambda value: value >= 2)]
Seed = Annotated[int, Allowed(f"within [0, {2**32 - 1}]", lambda value: 0 <= value < 2**32)]
PositiveFloat = Annotated[float, Allowed("finite and > 0", lambda value: 0 < value < math.inf)]
NonNegativeFloat = Annotated[float, Allowed("a finite number >= 0", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[float, Allowed("within [0, 1]", lambda value: 0 <= value <= 1)]
PositiveFraction = Annotated[float, Allowed("within (0, 1]", lambda value: 0 < value <= 1)]
FractionBelowOne = Annotated[float, Allowed("within [0, 1)", lambda value: 0 <= value < 1)]
UpdatesOrFraction = Annotated[
    int | float,
    Allowed(
        "a whole number of updates, or a fraction of the run, below 1",
        lambda value: value >= 0 and (value < 1 or value % 1 == 0),
    ),
]
NormOrder = Annotated[float, Allowed("a number >= 2, or inf", lambda value: value >= 2)]
# A directory named ~ would be created.
FilePath = Annotated[str, Allowed("a path; a leading ~ is not expanded", lambda path: path[:1] != "~")]
NonEmptyPath = Annotated[FilePath, Allowed("the name of a directory", lambda path: path.strip() != "")]


def check_values(section: Any, prefix: str = "") -> None:
    """Raise SettingsError for a value that its setting cannot have, whatever the other settings are.

    Args:
        section: a dataclass whose fields are settings, sections of settings, or lists of sections.
        prefix: what the names of its settings begin with.
    """
    kinds = get_type_hints(type(section), include_extras=True)
    for setting in dataclasses.fields(section):
        name, value = f"{prefix}{setting.name}", getattr(section, setting.name)
        if value is None:
            optional = setting.default is None or NoneType in get_args(kinds[setting.name])
            check(optional, name, "null", "it must have a value")
        elif dataclasses.is_dataclass(value):
            check_values(value, f"{name}.")
        elif isinstance(value, list) and all(map(dataclasses.is_dataclass, value)):
            for i, item in enumerate(value):
                check_values(item, f"{name}[{i}].")
        elif wrong := _wrong(kinds[setting.name], value):
            check(False, name, shown(value), wrong)


def check(condition: bool, setting: str, value: Any, allowed: str) -> None:
    """Raise SettingsError naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise SettingsError(f"{setting}: {value} is not allowed; {allowed}")


def shown(value: Any) -> str:
    """Return a value as YAML has it, for a message: in one line, and not much of a long one."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = str(list(value) if isinstance(value, tuple) else value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:197]}..."


def is_of_type(kind: Any, value: Any) -> bool:
    """Return whether a value has a setting's type, whatever its number or text is."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return is_of_type(arguments[0], value)
    if get_origin(kind) in (Union, UnionType):
        return any(is_of_type(one, value) for one in arguments)
    if get_origin(kind) is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if get_origin(kind) in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        kinds = item_kinds(kind, value)
        return len(kinds) == len(value) and all(map(is_of_type, kinds, value))
    # Exact types: YAML, in which a run's settings are kept, has no numbers of numpy, and no numbers that are bool.
    return type(value) is kind or (kind is float and type(value) is int)


def item_kinds(kind: Any, value: Sequence[Any]) -> tuple[Any, ...]:
    """Return the types that the items of a value of a list's or a tuple's type must have."""
    arguments = get_args(kind)
    return arguments if get_origin(kind) is tuple else arguments * len(value)


def describe(kind: Any) -> str:
    """Return a setting's type in a user's words, to complete "it must be"."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return describe(arguments[0])
    if get_origin(kind) is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if get_origin(kind) is list:
        return f"a list, each {describe(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"{len(arguments)} values, each {describe(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        return "settings: " + ", ".join(setting.name for setting in dataclasses.fields(kind))
    if get_origin(kind) in (Union, UnionType):
        words = " or ".join(describe(one) for one in arguments if one is not NoneType)
        return words + (", or null" if NoneType in arguments else "")
    return _TYPES.get(kind, str(kind))


def _wrong(kind: Any, value: Any) -> str | None:
    """Return what a value must be and is not; None if it is allowed."""
    if not is_of_type(kind, value):
        items = value if isinstance(value, (list, tuple)) else [value]
        foreign = [type(item).__name__ for item in items if type(item).__module__ != "builtins"]
        return f"it must be {describe(kind)}{f', not of type {foreign[0]}' if foreign else ''}"
    arguments = get_args(kind)
    if get_origin(kind) in (list, tuple):
        found = [wrong for wrong in map(_wrong, item_kinds(kind, value), value) if wrong]
        return found[0].replace("it must", "each must", 1) if found else None
    if get_origin(kind) in (Union, UnionType):
        alternatives = [_wrong(one, value) for one in arguments if is_of_type(one, value)]
        return None if None in alternatives else alternatives[0]
    rules = [*_ALWAYS, *(arguments[1:] if get_origin(kind) is Annotated else ())]
    return next((f"it must be {rule.words}" for rule in rules if not rule.holds(value)), None)


_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_ALWAYS = (
    Allowed("a number", lambda value: value == value),
    Allowed("less than 2^63", lambda value: type(value) is not int or abs(value) < 2**63),
    Allowed(
        "UTF-8 without control characters",
        lambda value: type(value) is not str or not any(unicodedata.category(c) in ("Cc", "Cs") for c in value),
    ),
)
