"""Read the rows of a run's metrics.jsonl, and write them so that no row is lost."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stacey_dist.errors import SettingsError
from stacey_dist.files import replace_file


class RowFile:
    """Writes a metrics.jsonl; rows that cannot be written, as on a full disk, wait until they can."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self._waiting: list[str] = []

    def drop_later(self, step: int, evaluated_step: int) -> None:
        """Drop the rows of updates after `step` and of evaluations after `evaluated_step`, which are made again.

        Raises SettingsError if the path is no regular file.
        """
        if self.path.exists() and not self.path.is_file():
            raise SettingsError(f"run_dir: {self.path} is no regular file; move it away")
        lines, bad = read_lines(self.path)
        if bad:
            shown = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
            self.say(f"warning: {self.path}: dropped {len(bad)} of its lines, which hold no row: line {shown}")
        kept = [line for line, row in lines if row["step"] <= (evaluated_step if is_evaluation(row) else step)]
        replace_file(self.path, b"".join(line + b"\n" for line in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Write a row. JSON has no NaN and no infinity: they become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._waiting.append(json.dumps(finite, allow_nan=False) + "\n")
        self.flush()

    def flush(self) -> int:
        """Write the rows that wait; return how many still wait."""
        if not self._waiting:
            return 0
        new = not self.path.exists()
        try:
            self._write_all_or_nothing(0 if new else self.path.stat().st_size)
        except OSError as error:
            if len(self._waiting) == 1:
                self.say(f"{self.path} could not be written, its rows are kept until it can: {error}")
            return len(self._waiting)
        if new:
            self.say(f"{self.path} was renamed or removed during the run; later rows are in a new one")
        self._waiting.clear()
        return 0

    def _write_all_or_nothing(self, end: int) -> None:
        try:
            with self.path.open("a") as file:
                file.writelines(self._waiting)
        except OSError:
            if self.path.exists():
                os.truncate(self.path, end)  # no row twice, and none by half
            raise


def is_evaluation(row: dict[str, Any]) -> bool:
    """Return whether a row has the figures of an evaluation, and not those of an update."""
    return any(name.startswith("eval_") for name in row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without lines that hold none."""
    return [row for _, row in read_lines(path)[0]]


def read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """Return the lines of a metrics.jsonl with their rows, and the numbers, from 1, of the lines that hold none.

    A row is a JSON object whose `step` is a whole number. The last line may have been cut short by a kill, and others
    by a disk that was full. Blank lines are left out.
    """
    lines: list[tuple[bytes, dict[str, Any]]] = []
    bad: list[int] = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(map(bytes.strip, content.split(b"\n")), start=1):
        if (row := _row(line)) is not None:
            lines.append((line, row))
        elif line:
            bad.append(number)
    return lines, bad


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):  # no JSON or UTF-8; a number of too many digits; nested too deeply
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and step >= 0 else None
