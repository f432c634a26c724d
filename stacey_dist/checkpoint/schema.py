"""Check every entry of a manifest, before any entry is used and before a manifest is written.

The checksum in a manifest detects damage, but not forgery: whoever writes a manifest can also write its checksum. So an
entry may have any JSON value.
"""

import math
import re
import reprlib
from collections.abc import Callable
from typing import Any, TypeGuard

from stacey_dist.checkpoint.shard import DTYPES

# The largest number of elements and the largest position that torch can hold.
_LARGEST = 2**63 - 1
_ITEM_BYTES = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in DTYPES}
# A plain name: no directory, nothing hidden, and what torch's own reader takes for a part of a checkpoint.
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether `value` is a whole number from 0 to 2^63 - 1. JSON's true is none."""
    return type(value) is int and 0 <= value <= _LARGEST


def is_text(value: Any) -> bool:
    """Return whether `value` is text that UTF-8 can hold."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "versions": (lambda v: type(v) is dict and all(map(is_text, [*v, *v.values()])), "versions by name"),
    "processes": (lambda v: is_count(v) and v > 0, "a number of processes"),
    "tensors": (lambda v: type(v) is dict, "tensors by name"),
    "extra": (lambda v: type(v) is dict, "entries by name"),
    "files": (lambda v: type(v) is dict, "files by name"),
}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError naming the first entry of a manifest that is not what the format has there.

    Entries that are not known are let through, as later versions of one format may add some.
    """
    for key, (is_right, expected) in _ENTRIES.items():
        if key not in manifest:
            raise ValueError(f"it has no {key}")
        if not is_right(manifest[key]):
            raise wrong_entry(key, manifest[key], expected)
    size = sum(_tensor_bytes(name, entry) for name, entry in manifest["tensors"].items())
    there = sum(_file_bytes(name, entry) for name, entry in manifest["files"].items())
    if size > there:  # before any memory is asked for
        raise ValueError(f"its tensors have {size} bytes, but its files only {there}")


def _tensor_bytes(name: str, entry: Any) -> int:
    """Return the size of a tensor. Raises ValueError."""
    kind, _, rest = name.partition("/")
    if not is_text(name) or not rest or (kind != "model" and (kind != "optimizer" or "/" not in rest)):
        raise wrong_entry("tensors", name, "model/NAME or optimizer/NAME/KEY")
    if type(entry) is not list or len(entry) != 2:
        raise wrong_entry(f"tensors.{name}", entry, "a shape and a dtype")
    shape, dtype = entry
    if type(shape) is not list or not all(map(is_count, shape)) or math.prod(n or 1 for n in shape) > _LARGEST:
        raise wrong_entry(f"tensors.{name}", shape, "a shape")
    if kind == "optimizer" and rest.endswith("/step") and shape:
        raise wrong_entry(f"tensors.{name}", shape, "the shape of a count of updates, []")
    if type(dtype) is not str or dtype not in _ITEM_BYTES:
        raise wrong_entry(f"tensors.{name}", dtype, f"one of {', '.join(_ITEM_BYTES)}")
    return math.prod(shape) * _ITEM_BYTES[dtype]


def _file_bytes(name: str, entry: Any) -> int:
    """Return the size of a file. Raises ValueError."""
    if not _FILE.fullmatch(name):
        raise wrong_entry("files", name, "the name of a safetensors file")
    size, sha256 = (entry.get("bytes"), entry.get("sha256")) if type(entry) is dict else (None, None)
    if not is_count(size) or type(sha256) is not str or not _SHA256.fullmatch(sha256):
        raise wrong_entry(f"files.{name}", entry, "a size and a checksum")
    return size


def wrong_entry(where: str, value: Any, expected: str) -> ValueError:
    """Return the error for an entry that is not what the format has there; its text may be of any length."""
    return ValueError(f"{where[:200]!a}"[1:-1] + f": {reprlib.repr(value)} is not {expected}")
