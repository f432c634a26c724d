"""Check the entries of a checkpoint, other than its tensors, that a run resumes from. A file may hold any value."""

from typing import Any

from stacey_dist.checkpoint.schema import is_count, wrong_entry

_COUNTS = ("step", "position", "skipped_steps")
_COUNTS_OR_NULL = ("best_step", "kept_best_step", "evaluated_step")


def check_progress(extra: dict[str, Any]) -> None:
    """Raise ValueError unless a manifest's `extra` has what a run resumes from."""
    for key in (*_COUNTS, *_COUNTS_OR_NULL):
        value = extra.get(key, 0)
        if not is_count(value) and (value is not None or key in _COUNTS):
            raise wrong_entry(f"extra.{key}", value, "a count")
    if type(extra.get("best_score")) not in (int, float, type(None)):
        raise wrong_entry("extra.best_score", extra["best_score"], "a number")
    for key in ("config", "trackers", "scaler"):
        if type(extra.get(key) or {}) is not dict:
            raise wrong_entry(f"extra.{key}", extra[key], "entries by name")
    if "config" not in extra:
        return
    settings = extra["config"].get("checkpoint", {}) if type(extra["config"]) is dict else None
    if type(settings) is not dict or type(settings.get("resume_from")) not in (str, type(None)):
        raise wrong_entry("extra.config", extra["config"], "settings")
