"""Code that the benchmarks share."""

import statistics


def median_and_minimum(values: list[float], unit: float) -> str:
    """Return the two figures, in `unit` seconds."""
    return f"{statistics.median(values) / unit:9.3f} {min(values) / unit:9.3f}"


def show(title: str, *rows: tuple[object, ...]) -> None:
    """Print a table; the first row is its head."""
    print(f"\n{title}\n")
    for row in rows:
        print("| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row) + " |")
        if row is rows[0]:
            print("|---" * len(row) + "|")
