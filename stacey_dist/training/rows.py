"""The rows of a run's metrics.jsonl; in a file of its own, for readers that train nothing and need no torch."""

import json
from pathlib import Path
from typing import Any


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
