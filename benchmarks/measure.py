"""Code that the benchmarks share."""

import statistics


def median_and_minimum(values: list[float], unit: float) -> str:
    """Return the two figures, in `unit` seconds."""
    return f"{statistics.median(values) / unit:9.3f} {min(values) / unit:9.3f}"
