"""Write a rank's ranges as a file in `torch.distributed.checkpoint`'s safetensors format, and read ranges from it.

torch's writer assembles the file in memory while it holds the GIL, and the file has to be read again for its checksum.
Here each tensor is written and hashed in place, without the GIL, so training continues.
torch's reader opens every file on every rank. Here a rank opens files until it has the elements that it needs.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stacey_dist.errors import SettingsError
from stacey_dist.files import check_regular, parse_json

# safetensors refuses to read a longer one.
_MAX_HEADER_BYTES = 100_000_000
# The dtypes that a checkpoint can hold, with safetensors' names of them.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# Elements checked at a time: so few that torch uses the calling thread alone, and none of those that train.
_CHUNK = 1 << 15


@dataclass(frozen=True)
class Range:
    """Elements [start, start + values.numel()) of a flattened tensor.

    Attributes:
        trained: whether they are of a trainable weight or an optimizer state, which must be finite for training to
            continue. Frozen parameters and buffers may hold infinities, as attention masks do.
    """

    start: int
    values: Tensor
    trained: bool = False

    @property
    def stop(self) -> int:
        """The position after the last element."""
        return self.start + self.values.numel()


def all_finite(values: Tensor) -> bool:
    """Return whether no element of a tensor in host memory is NaN or infinite. Whole numbers are finite."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    for chunk in values.reshape(-1).split(_CHUNK):
        if chunk.element_size() == 1:  # torch has no aminmax of float8
            chunk = chunk.float()
        smallest, largest = chunk.aminmax()  # without a temporary; each is NaN if any element is
        if not (math.isfinite(smallest.item()) and math.isfinite(largest.item())):
            return False
    return True


def shard_name(rank: int) -> str:
    """Return the name that torch's storage gives the one file of a rank."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def write_shard(path: Path, ranges: dict[str, Range]) -> tuple[dict[str, Any], bool | None]:
    """Write ranges in host memory and wait until they are on the disk.

    Returns the file's size and SHA-256, and whether all `trained` ranges are finite; None if there are none.

    Raises OSError naming the file, SettingsError for a dtype that safetensors lacks or too long a header.
    """
    # The widest first, so that each tensor is aligned.
    ordered = sorted(ranges.items(), key=lambda item: (-item[1].values.element_size(), item[0]))
    digest = hashlib.sha256()
    finite: bool | None = None
    try:
        with path.open("wb") as opened:
            header = _header(ordered)
            opened.write(header)
            digest.update(header)
            for _, part in ordered:
                if part.trained:  # between writes: written bytes show the thread that listens for signals progress
                    finite = finite is not False and all_finite(part.values)
                piece: Any = part.values.view(torch.uint8).numpy()
                opened.write(piece)
                digest.update(piece)
            opened.flush()
            os.fsync(opened.fileno())
            size = opened.tell()
    except OSError as error:
        raise OSError(f"{path}: {error}") from error
    return {"bytes": size, "sha256": digest.hexdigest()}, finite


def read_shards(directory: Path, files: Iterable[str], ranges: dict[str, Range]) -> None:
    """Fill the ranges, in any memory, from files of a directory, opened in this order until everything is found.

    An element that several files have is taken from the first of them.

    Raises OSError naming a file that cannot be read, or tensors with elements that are in none.
    """
    missing = {name: [(part.start, part.stop)] for name, part in ranges.items() if part.values.numel()}
    for file in files:
        if not missing:
            return
        try:
            found = _read_shard(directory / file, ranges, missing)
        except Exception as error:  # of many kinds where a header is damaged or memory runs out
            number = getattr(error, "errno", None) or errno.EIO
            raise OSError(number, f"{directory / file}: cannot be read: {error!r}") from error
        missing = {name: left for name, gaps in missing.items() if (left := _without(gaps, found.get(name)))}
    if missing:
        raise OSError(errno.EIO, f"{directory}: its files do not have all of {', '.join(sorted(missing)[:3])}")


def _read_shard(
    path: Path, ranges: dict[str, Range], missing: dict[str, list[tuple[int, int]]]
) -> dict[str, tuple[int, int]]:
    """Fill those missing elements that one file has; return the range that the file has of each tensor, by name."""
    found = {}
    check_regular(path)
    with torch.device("cpu"), safe_open(path, framework="pt") as opened:  # it makes tensors on the default device
        offsets = parse_json(opened.metadata()["DCP_SHARDING_INFO"])
        for name in [name for name in offsets if name in missing]:
            (offset,), written, wanted = offsets[name]["saved_offsets"], opened.get_slice(name), ranges[name]
            (count,) = written.get_shape()
            if type(offset) is not int or offset < 0:
                raise ValueError(f"the offset of {name} is {offset!r}")
            for first, last in missing[name]:
                start, stop = max(first, offset), min(last, offset + count)
                if start < stop:
                    target = wanted.values[start - wanted.start : stop - wanted.start]
                    _copy(name, written[start - offset : stop - offset], target)
            found[name] = (offset, offset + count)
    return found


def _copy(name: str, values: Tensor, target: Tensor) -> None:
    """Copy values into a tensor, which may have another dtype if that holds all of them. Raises ValueError."""
    target.copy_(values)
    if values.dtype != target.dtype and not torch.equal(target.to(values), values):
        raise ValueError(f"{name} is {values.dtype}, which {target.dtype} does not hold")


def _without(gaps: list[tuple[int, int]], found: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Return ranges [start, stop) without the elements of another."""
    if found is None:
        return gaps
    sides = [side for a, b in gaps for side in ((a, min(b, found[0])), (max(a, found[1]), b))]
    return [(start, stop) for start, stop in sides if start < stop]


def _header(ordered: list[tuple[str, Range]]) -> bytes:
    """Return the header of a file: its length, and JSON that says where each tensor lies and which range it is."""
    metadata = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        "DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [part.start]} for name, part in ordered}),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, part in ordered:
        if part.values.dtype not in DTYPES:
            raise SettingsError(f"{name}: tensors of {part.values.dtype} can't be saved")
        stop = position + part.values.nbytes
        header[name] = {
            "dtype": DTYPES[part.values.dtype],
            "shape": [part.values.numel()],
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise SettingsError(
            f"the names and ranges of {len(ordered)} tensors take {len(text) / 1e6:.0f} MB in a file's header, and "
            "safetensors reads at most 100 MB; save with more ranks"
        )
    return len(text).to_bytes(8, "little") + text
