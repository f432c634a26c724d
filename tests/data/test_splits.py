"""Splits that overlap, against the rows that `datasets` would read."""

import pytest
from datasets import ReadInstruction
from hypothesis import given
from hypothesis import strategies as st

from stacey_dist.data.splits import overlap

SIZES = [*range(1, 33), 100, 200, 1000]
"""Numbers of rows of a dataset. Percentages are exact from 100 on."""


@st.composite
def parts(draw: st.DrawFn, units: list[str], least: int) -> str:
    name, unit = draw(st.sampled_from(["train", "train", "test"])), draw(st.sampled_from(units))
    first, stop = (draw(st.none() | st.integers(least, 30)) for _ in range(2))
    if first is None and stop is None:
        return draw(st.sampled_from([name, f"{name}[:]"]))
    return f"{name}[{'' if first is None else f'{first}{unit}'}:{'' if stop is None else f'{stop}{unit}'}]"


def splits(units: list[str], least: int) -> st.SearchStrategy[str]:
    return st.lists(parts(units, least), min_size=1, max_size=2).map(" + ".join)


def rows(split: str, size: int) -> set[tuple[str, int]] | None:
    """Return the rows that `datasets` would read, or None where it would refuse the split or a part has no rows."""
    try:
        read = ReadInstruction.from_spec(split).to_absolute({"train": size, "test": size})
    except ValueError:
        return None
    if any(part.from_ >= part.to for part in read):
        return None
    return {(part.splitname, row) for part in read for row in range(part.from_, part.to)}


def shared(one: str, other: str) -> list[bool]:
    """Return for each size of the dataset at which both splits have rows whether some are in both."""
    sizes = [size for size in SIZES if size >= 100 or "%" not in one + other]
    read = [(rows(one, size), rows(other, size)) for size in sizes]
    return [bool(some & others) for some, others in read if some and others]


@given(splits(["", "%"], -30), splits(["", "%"], -30))
def test_splits_that_overlap_do_so_at_every_size(one: str, other: str) -> None:
    assert not overlap(one, other) or all(shared(one, other))


@pytest.mark.parametrize(("unit", "least"), [("", 0), ("%", -30)])
@given(data=st.data())
def test_splits_that_do_not_overlap_are_apart_at_some_size(unit: str, least: int, data: st.DataObject) -> None:
    """Rows that are counted from both ends may be in both splits at every size, and yet not count as certain."""
    one, other = (data.draw(splits([unit], least)) for _ in range(2))
    found = shared(one, other)
    assert overlap(one, other) or not found or not all(found)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("train", "train", True),
        ("train", "validation", False),
        ("train", "train[:1%]", True),
        ("train[1%:]", "train[:1%]", False),
        ("train[1%:]", "train[:2%]", True),
        ("train[10:20%]", "train[15%:16%]", True),
        ("train[:5%]", "train[-95%:]", False),
        ("train[:6%]", "train[-95%:]", True),
        ("train[:1_000]", "train[999:]", True),
        ("train[:-10]", "train[-10:]", False),
        ("train[:-10]", "train[-11:]", True),
        ("train[:1000]", "train[50%:]", False),
        ("train+test", "validation + test[:1%](pct1_dropremainder)", True),
        ("all", "test", True),
        ("train", "train.1", False),
        ("train[", "train[", True),
        ("train[", "train", False),
    ],
)
def test_overlap(one: str, other: str, expected: bool) -> None:
    assert overlap(one, other) is overlap(other, one) is expected
