"""The error of a training run that failed."""


class TrialError(RuntimeError):
    """A training run of an experiment ended with an error that is not its settings'. The message has its last words."""
