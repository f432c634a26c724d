"""The progress of a run as a line of text."""

from typing import Any


def progress_line(row: dict[str, Any], unit: str, max_steps: int, seconds_left: float) -> str:
    """Return a row of metrics.jsonl as a line; `unit` is what it counts, as in "tokens"."""
    parts = [
        f"step {row['step']}/{max_steps}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"grad norm {row['grad_norm']:.3f}",
        f"{row[f'{unit}_per_second']:,.0f} {unit}/s",
    ]
    if "mfu" in row:
        parts.append(f"mfu {row['mfu']:.1%}")
    parts += [f"data {row['data_wait']:.0%}", f"{row['memory_gb']:.1f} GB", f"ETA {duration(seconds_left)}"]
    if row["skipped_steps"]:
        parts.append(f"{row['skipped_steps']} skipped")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as 42s, 3m10s or 5h02m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
