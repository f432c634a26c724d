"""Which splits of a dataset have rows in common, so that no held-out row is trained on."""

import itertools
import re

_Bound = int | None

# As `datasets` reads a split: a name and perhaps a slice, in rows or in percent where one of its bounds has the sign.
_PART = re.compile(r"(?P<name>\w+(?:\.\w+)*)(?:\[(?P<first>-?[\d_]+%?)?:(?P<stop>-?[\d_]+%?)?\])?(?:\([^)]*\))?")


def overlap(one: str, other: str) -> bool:
    """Return whether two splits certainly have rows in common, however many rows the dataset has.

    ``train`` and ``train[:1%]`` do, ``train[:1%]`` and ``train[1%:]`` do not. For ``train[:1000]`` and ``train[50%:]``
    that depends on the number of rows, so the answer is no.

    Args:
        one, other: splits as `datasets.load_dataset` takes them. What it would refuse overlaps only with itself.
    """
    return one == other or any(itertools.starmap(_parts_overlap, itertools.product(_parts(one), _parts(other))))


def _parts(split: str) -> list[re.Match[str]]:
    return [part for text in split.split("+") if (part := _PART.fullmatch(text.strip()))]


def _parts_overlap(one: re.Match[str], other: re.Match[str]) -> bool:
    if one["name"] != other["name"] and "all" not in (one["name"], other["name"]):
        return False
    (first, stop, unit), (other_first, other_stop, other_unit) = _slice(one), _slice(other)
    alike = unit == other_unit
    return _certainly_before(first, other_stop, alike) and _certainly_before(other_first, stop, alike)


def _slice(part: re.Match[str]) -> tuple[_Bound, _Bound, str]:
    """Return the first row of a part, the row behind its last, and the unit of both; None for an end of the split."""
    bounds = [part["first"] or "", part["stop"] or ""]
    unit = "%" if any("%" in bound for bound in bounds) else "rows"
    first, stop = (int(bound.rstrip("%")) if bound else None for bound in bounds)
    if unit == "%":  # -5 % is 95 %
        first, stop = (bound + 100 if bound is not None and bound < 0 else bound for bound in (first, stop))
    return first or None, stop, unit


def _certainly_before(first: _Bound, stop: _Bound, same_unit: bool) -> bool:
    """Return whether a slice's first row is before where another stops. Rows below 0 count from the end."""
    if first is None or stop is None:
        return True
    return same_unit and (first < 0) == (stop < 0) and first < stop
