"""Convert the state of torch's and DeepSpeed's loss scalers to one form, so that an fp16 run resumes on any engine.

Both double the scale after a number of consecutive applied updates, and halve it if a gradient is not finite. The form
is {"scale": s, "applied": n, "hysteresis": h}. n counts the consecutive applied updates. h is the number of overflows
after which DeepSpeed halves the scale; torch has no such number (None).
"""

from typing import Any

import torch
from torch.amp import GradScaler

from stacey_dist.checkpoint.schema import is_count

# A scale is a positive number that float32 holds: torch keeps it in a float32.
_SMALLEST, _LARGEST = 2.0**-149, torch.finfo(torch.float32).max


def state_of(scaler: Any) -> dict[str, Any]:
    """Return the state of torch's scaler, or of DeepSpeed's dynamic one."""
    if isinstance(scaler, GradScaler):
        return {"scale": scaler.get_scale(), "applied": scaler._get_growth_tracker(), "hysteresis": None}
    # DeepSpeed counts all updates, and remembers the last overflow.
    applied = scaler.cur_iter - scaler.last_overflow_iter - 1
    if applied > 0:  # it doubles the scale after 1, 2, ... windows, in the update that follows
        applied = (applied - 1) % scaler.scale_window + 1
    return {"scale": scaler.cur_scale, "applied": applied, "hysteresis": scaler.cur_hysteresis}


def is_state(state: Any) -> bool:
    """Return whether `load` takes a state. A file may hold any value."""
    if not isinstance(state, dict):
        return False
    scale, hysteresis = state.get("scale"), state.get("hysteresis")
    is_scale = isinstance(scale, int | float) and not isinstance(scale, bool) and _SMALLEST <= scale <= _LARGEST
    return is_scale and is_count(state.get("applied")) and (hysteresis is None or is_count(hysteresis))


def load(state: dict[str, Any], scaler: Any) -> None:
    """Load what `state_of` returned for either scaler."""
    if isinstance(scaler, GradScaler):
        applied = min(state["applied"], scaler.get_growth_interval() - 1)
        scaler.load_state_dict(scaler.state_dict() | {"scale": state["scale"], "_growth_tracker": applied})
        return
    scaler.cur_scale = state["scale"]
    scaler.cur_iter, scaler.last_overflow_iter = state["applied"], -1
    if state.get("hysteresis") is not None:
        scaler.cur_hysteresis = state["hysteresis"]
