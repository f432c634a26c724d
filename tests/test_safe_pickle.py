"""Pickles of other makers: plain data come out, all else is refused at once."""

import contextlib
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.checkpoint.importers import torch_file
from stacey_dist.safe_pickle import Function, record, unpickle

ARRAY = record("ndarray")
KNOWN = {
    ("torch", "Size"): torch_file.SIZE,
    ("collections", "OrderedDict"): torch_file.ORDERED,
    ("numpy._core.multiarray", "_reconstruct"): Function(lambda *_: ARRAY()),
    ("numpy", "ndarray"): ARRAY,
    ("numpy", "dtype"): record("dtype"),
}
STATE = {"data": np.arange(100, dtype=np.uint8), "names": [b"a.png", "b"] * 4, "numbers": (1, 2.5, -3), 4: None}
KEYS = st.integers(-(2**60) + 1, 2**60 - 1)  # larger ones are refused
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300),
    lambda values: (
        st.lists(values) | st.tuples(values, values) | st.dictionaries(st.text() | st.binary() | KEYS, values)
    ),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_data_are_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert repr(unpickle(content, {})) == repr(pickle.loads(content))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_are_plain_data_or_refused(data: st.DataObject) -> None:
    content = bytearray(pickle.dumps(STATE, data.draw(st.integers(0, 4))))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Exception):
        unpickle(bytes(content), KNOWN)


# What each costs Python's own unpickler: hours for a hash, all memory, or the process.
TUPLE_OF_TUPLES = b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."
DEEP_KEY = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."
ENCODED_AGAIN = (
    b"\x80\x02(c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + b"x" * 65536 + b"q\x01X\x06\x00\x00\x00latin1q\x02"
)
ENCODED_AGAIN += b"h\x00h\x01h\x02\x86R" * 100_000 + b"l."


SIZE, DTYPE, ORDERED = b"ctorch\nSize\n", b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n"
LIST, TUPLE = b"](" + b"K\x01" * 20_000 + b"e", b"(" + b"K\x01" * 20_000 + b"t"
DICT = b"}(" + b"".join(b"M" + i.to_bytes(2, "little") + b"N" for i in range(20_000)) + b"u"


def again(called: bytes, given: bytes, call: bytes, before: bytes = b"") -> bytes:
    """Return a pickle that calls one thing with another 100 000 times."""
    once = before + b"h\x00h\x01" + call
    return b"\x80\x02" + called + b"q\x000" + given + b"q\x010(" + once * 100_000 + b"l."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (TUPLE_OF_TUPLES, "a key that is a tuple"),
        (TUPLE_OF_TUPLES.replace(b"2\x86", b"q\x00h\x00\x86"), "a key that is a tuple"),
        (DEEP_KEY, "a key that is a tuple"),
        (ENCODED_AGAIN, "it would grow without end"),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00utf-16\x86R.",
            "encoding 'utf-16' has no place",
        ),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a)" + b"2\x86" * 40 + b"\x86R.",
            r"encoding \(\(\(.*has no place",
        ),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "an instruction that has no place in it"),
        (again(SIZE, LIST, b"\x85R"), "the shape or strides of a tensor are invalid"),
        (again(SIZE, LIST, b"o", before=b"("), "an instruction that has no place in it"),
        (again(DTYPE, TUPLE, b"\x81"), "20000 arguments of a class"),
        (again(DTYPE, TUPLE, b"R"), "20000 arguments of a class"),
        (again(SIZE, TUPLE, b"R"), "20000 arguments of a function"),
        (again(DTYPE, LIST, b"R"), "it has an instruction for a list"),
        (again(DTYPE, LIST, b"\x81"), "it has an instruction for a list"),
        (again(ORDERED, DICT, b"\x85R"), "positional argument"),
        (b"\x80\x02" + ORDERED + b"]](" + b")" + b"2\x86" * 40 + b"K\x01ea\x85R.", "positional argument"),
        (b"\x80\x02" + ORDERED + b"]](" + b")" + b"\x85" * 1_000_000 + b"K\x01ea\x85R.", "positional argument"),
        (b"\x80\x04" + DTYPE + b")}\x92.", "an instruction that has no place in it"),
        (b"(" + b"inumpy\ndtype\n.", "an instruction that has no place in it"),
        (again(b"}", b"\x8b" + (10**5).to_bytes(4, "little") + b"\x01" * 10**5, b"K\x01s"), "a key that is a int"),
        (b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.", "it has an instruction for a _Fixed"),
        (b"I" + b"9" * 5000 + b"\n.", "4300 digits"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", None),
        (b"\x80\x02K\x01", None),
        (b"\x80\x02cos\nsystem\n.", r"os\.system has no place in it"),
        (b"\x80\x02\x82\x01.", r"a class by its number \(1\) has no place in it"),
        (b"Pgo\n.", "a reference to another file has no place in it"),
    ],
)
def test_hostile_pickles_end_at_once(content: bytes, reason: str | None) -> None:
    with pytest.raises(Exception, match=reason) as caught:
        unpickle(content, KNOWN)
    assert not isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("key", [2**61 - 1, -(2**60), 2.0**61, float("inf")])
@pytest.mark.parametrize("protocol", [0, 2])
def test_keys_whose_hashes_can_be_chosen_are_refused(key: float, protocol: int) -> None:
    """Multiples of 2^61 - 1 have the hash 0, and reading n of them takes n^2 comparisons."""
    with pytest.raises(pickle.UnpicklingError, match="a key that is"):
        unpickle(pickle.dumps({key: 1, 1: 2}, protocol), {})
    assert unpickle(pickle.dumps({2**60 - 1: 1, 1.5: 2}, protocol), {}) == {2**60 - 1: 1, 1.5: 2}
