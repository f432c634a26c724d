"""Types of settings with their allowed values, and the check of a configuration against them.

They are `Annotated` types, not jsonargparse's. So values stay plain numbers, which YAML and JSON can hold, and values
that a program assigns are checked too.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Callable
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
        elif wrong := _wrong(kinds[setting.name], value):
            shown = list(value) if isinstance(value, tuple) else value
            check(False, name, shown if str(shown).isprintable() else repr(shown), wrong)
        elif dataclasses.is_dataclass(value):
            check_values(value, f"{name}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    check_values(item, f"{name}[{i}].")


def check(condition: bool, setting: str, value: Any, allowed: str) -> None:
    """Raise SettingsError naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise SettingsError(f"{setting}: {value} is not allowed; {allowed}")


def _wrong(kind: Any, value: Any) -> str | None:
    """Return what a value must be and is not; None if it is allowed."""
    arguments = get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return None if isinstance(value, kind) else f"it must be a {kind.__name__}"
    if get_origin(kind) is Literal:
        types = [{type(one), type(value)} for one in arguments if value == one]
        is_one = any(len(both) == 1 or both == {int, float} for both in types)  # not one of numpy's
        return None if is_one else f"it must be one of {', '.join(map(str, arguments))}"
    if get_origin(kind) in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return "it must be a list"
        if get_origin(kind) is tuple and len(value) != len(arguments):
            return f"it must be {len(arguments)} values"
        kinds = arguments if get_origin(kind) is tuple else arguments * len(value)
        found = [wrong for inner, item in zip(kinds, value, strict=True) if (wrong := _wrong(inner, item))]
        return found[0].replace("it must", "each must", 1) if found else None
    if get_origin(kind) in (Union, UnionType):
        first, *others = (_wrong(one, value) or "" for one in arguments if one is not NoneType)
        if "" in (first, *others):
            return None
        return " or ".join([first, *(wrong.removeprefix("it must be ") for wrong in others)])
    plain = arguments[0] if get_origin(kind) is Annotated else kind
    if get_origin(plain) is UnionType:
        plain = float
    # Exact types: YAML, in which a run's settings are kept, has no numbers of numpy, and no numbers that are bool.
    if (name := _TYPES.get(plain)) and type(value) is not plain and not (plain is float and type(value) is int):
        foreign = type(value).__module__ != "builtins"
        return f"it must be {name}{f', not of type {type(value).__name__}' if foreign else ''}"
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
