"""Errors that are the user's to mend."""

import difflib
from collections.abc import Collection


class SettingsError(ValueError):
    """A bad setting or file. The message names the setting or file, its value and what is allowed.

    The launchers print the message alone, without a stack trace.
    """


class StoppedWaitingError(SettingsError):
    """The process was told to stop while it waited for data, and none came."""


class DivergedError(SettingsError):
    """Too many losses or gradients in a row were not finite."""


def unknown(setting: str, value: str, known: Collection[str], *, spelled: str, cutoff: float) -> SettingsError:
    """The error for a value that is none of `known`: it says all of them, and first the one nearest to `spelled`.

    `spelled` is the value as the known ones are spelled; `cutoff` is how alike the nearest has to be, from 0 to 1.
    """
    close = difflib.get_close_matches(spelled, known, n=1, cutoff=cutoff)
    hint = f"did you mean {close[0]}? " if close else ""
    return SettingsError(f"{setting}: {value} is not known; {hint}there are {', '.join(known)}")
