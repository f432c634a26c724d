"""Errors that are the user's to mend."""


class SettingsError(ValueError):
    """A bad setting or file. The message names the setting or file, its value and what is allowed.

    The launchers print the message alone, without a stack trace.
    """
