"""Print the progress of a run: one line per row in a log, one line that is overwritten on a terminal."""

import sys
from typing import Any


class ProgressLine:
    """Prints the rows of metrics.jsonl for people.

    Args:
        unit: what is counted per second, as in "tokens".
        max_steps: updates of the whole run.
    """

    def __init__(self, unit: str, max_steps: int) -> None:
        self.unit, self.max_steps = unit, max_steps
        self.live = sys.stdout.isatty()

    def print(self, row: dict[str, Any], seconds_left: float, *, keep: bool) -> None:
        """Print a row; on a terminal, the next one takes its place unless it is to be kept."""
        line = "  ".join(self._parts(row, seconds_left))
        if self.live:
            print(f"\r\x1b[K{line}", end="\n" if keep else "", flush=True)
        else:
            print(line, flush=True)

    def below(self, message: str) -> str:
        """Return a message that does not begin at the end of a line on the terminal."""
        return ("\n" if self.live else "") + message

    def _parts(self, row: dict[str, Any], seconds_left: float) -> list[str]:
        parts = [
            f"step {row['step']}/{self.max_steps}",
            f"epoch {row['epoch']:.2f}",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.2e}",
            f"grad norm {row['grad_norm']:.3f}",
            f"{row[f'{self.unit}_per_second']:,.0f} {self.unit}/s",
        ]
        if "mfu" in row:
            parts.append(f"mfu {row['mfu']:.1%}")
        parts += [f"data {row['data_wait']:.0%}", f"{row['memory_gb']:.1f} GB", f"ETA {duration(seconds_left)}"]
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} skipped")
        return parts


def duration(seconds: float) -> str:
    """Return seconds as 42s, 3m10s or 5h02m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
