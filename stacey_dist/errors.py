"""Errors that the user can fix."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager


class SettingsError(ValueError):
    """A bad setting or file. The message names the setting or file, its value and what is allowed.

    The launchers print the message alone, without a stack trace.
    """


class InputError(ValueError):
    """An argument, file or record that a function cannot use.

    The message says in one line what is wrong and what is allowed. Where it is about an argument, it begins with the
    argument's name, as in "max_tokens: 0 is not allowed; it must be at least 2"; other arguments that it mentions stand
    in backquotes. `settings_errors` puts the launcher's names in their place.
    """


class StoppedWaitingError(SettingsError):
    """The process was told to stop while it waited for data, and none came."""


class DivergedError(SettingsError):
    """Too many losses or gradients in a row were not finite."""


def unknown(setting: str, value: str, known: Collection[str], *, spelled: str, cutoff: float) -> SettingsError:
    """Return the error for a value that is none of `known`: it names all, and first the one nearest to `spelled`.

    `spelled` is the value as the known ones are spelled; `cutoff` is how alike the nearest has to be, from 0 to 1.
    """
    close = difflib.get_close_matches(spelled, known, n=1, cutoff=cutoff)
    hint = f"did you mean {close[0]}? " if close else ""
    return SettingsError(f"{setting}: {value} is not known; {hint}there are {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)[:300]}" if str(error).strip() else type(error).__name__


@contextmanager
def settings_errors(settings: Mapping[str, str]) -> Iterator[None]:
    """Raise an `InputError` as a `SettingsError` that names the user's settings in place of arguments.

    Args:
        settings: The setting that an argument was given by, as in `{"files": "data.files"}`. The argument's name at the
            beginning of a message, and in backquotes anywhere in it, is replaced.
    """
    try:
        yield
    except InputError as error:
        raise SettingsError(_name_settings(str(error), settings)) from error


def _name_settings(message: str, settings: Mapping[str, str]) -> str:
    first = re.match(r"\w+(?=:)", message)
    if first and first[0] in settings:
        message = settings[first[0]] + message[first.end() :]
    return re.sub(r"`(\w+)`", lambda name: settings.get(name[1], name[0]), message)
