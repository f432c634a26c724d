"""Read the tensors of a directory of torch.distributed.checkpoint, without torch's own reader.

`.metadata` is a pickle that names the tensors, and where their pieces lie in files beside it: each piece is what
`torch.save` wrote, from one byte to another. torch's reader unpickles the metadata without limits, and also the entries
that are no tensors. Here the metadata are read once, into objects that do nothing, and made into plain values; entries
that are no tensors are never opened.
"""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stacey_dist.checkpoint.importers import torch_file
from stacey_dist.checkpoint.schema import is_count
from stacey_dist.files import open_regular
from stacey_dist.safe_pickle import Function, Record, record, unpickle

T = TypeVar("T")

_METADATA = {name: record(name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")}
_CHUNK, _TENSOR, _BYTES = (record(f"{kind}StorageMetadata") for kind in ("Chunk", "Tensor", "Bytes"))
_PROPERTIES, _PLACE = record("TensorProperties"), record("_StorageInfo")
_PATH = Function(lambda *_: None)  # where it was saved, which is not read
_KNOWN = {
    **torch_file.DTYPES,
    ("collections", "OrderedDict"): torch_file.ORDERED,
    ("pathlib", "PosixPath"): _PATH,
    ("pathlib._local", "PosixPath"): _PATH,
    ("torch", "Size"): torch_file.SIZE,
    ("torch.serialization", "_get_layout"): Function(lambda name: name),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _PLACE,
    **{
        ("torch.distributed.checkpoint.metadata", kind.__name__): kind
        for kind in (*_METADATA.values(), _CHUNK, _TENSOR, _BYTES, _PROPERTIES)
    },
}


@dataclass(frozen=True)
class _Piece:
    """Where a part of a tensor begins, its shape, and the bytes [start, stop) of the file that it is in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Described:
    """One tensor as the metadata have it."""

    size: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[_Piece]


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of the directory by their names, as wholes in host memory.

    Raises:
        Exception: a file is missing, damaged or something else; the metadata do not fit together, or name a file that
            is not in the directory.
    """
    with open_regular(directory / ".metadata", follow_links=False) as opened:
        described = _describe(unpickle(opened.read(), _KNOWN))
    _check_places(directory, described)
    tensors = {}
    for name, tensor in described.items():
        values = torch.empty(tensor.size, dtype=tensor.dtype)
        filled = torch.zeros(tensor.size, dtype=torch.bool)
        for piece in tensor.pieces:
            region = tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.sizes, strict=True))
            if filled[region].any():
                raise ValueError(f"{name}: two pieces have the same elements")
            values[region] = _load_piece(directory, name, piece, tensor.dtype)
            filled[region] = True
        if not filled.all():
            raise ValueError(f"{name}: some of its elements are missing")
        tensors[name] = values
    return tensors


def _describe(metadata: Any) -> dict[str, _Described]:
    """Return the tensors of the metadata in plain values, each checked. Raises ValueError."""
    fields = _fields(metadata, _METADATA["Metadata"])
    places = {}
    for index, place in _typed(fields.get("storage_data"), dict, "dictionary").items():
        key = _fields(index, _METADATA["MetadataIndex"])
        name, offset = _typed(key.get("fqn"), str, "name"), key.get("offset")
        if offset is not None:
            offset = _sizes(offset)
        if (name, offset) in places:
            raise ValueError(f"{name}: a piece is in two places")
        places[name, offset] = _fields(place, _PLACE)
    described = {}
    for name, entry in _typed(fields.get("state_dict_metadata"), dict, "dictionary").items():
        _typed(name, str, "name")
        if type(entry) is _BYTES:
            continue
        tensor = _fields(entry, _TENSOR)
        properties = tensor.get("properties")
        if type(properties) is not _PROPERTIES or type(properties.state) is not tuple or not properties.state:
            raise ValueError("a tensor has no properties")
        size, dtype, chunks = _sizes(tensor.get("size")), properties.state[0], tensor.get("chunks")
        if type(dtype) is not torch.dtype or type(chunks) is not list:
            raise ValueError(f"{name!a}: a tensor has no dtype or no pieces")
        pieces = [_piece(name, _fields(chunk, _CHUNK), size, places) for chunk in chunks]
        described[name] = _Described(size, dtype, pieces)
    return described


def _piece(name: str, chunk: dict[str, Any], whole: tuple[int, ...], places: dict[Any, dict[str, Any]]) -> _Piece:
    offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
    if not len(offsets) == len(sizes) == len(whole) or any(
        offset + size > end for offset, size, end in zip(offsets, sizes, whole, strict=True)
    ):
        raise ValueError(f"{name}: a piece is not within it")
    place = places.get((name, offsets))
    if place is None:
        raise ValueError(f"{name}: no location is given for a piece of it")
    file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
    if type(file) is not str or file in ("", ".", "..") or "/" in file or "\0" in file:
        raise ValueError(f"{name}: {str(file)!a} is not the name of a file in the directory")
    if not is_count(start) or not is_count(length):
        raise ValueError(f"{name}: no location is given for a piece of it")
    if place.get("transform_descriptors"):
        raise ValueError(f"{name}: it is compressed or encrypted, which is not read")
    return _Piece(offsets, sizes, file, start, start + length)


def _check_places(directory: Path, described: dict[str, _Described]) -> None:
    """Raise ValueError, before memory is allocated, if pieces share bytes or a tensor is larger than its pieces."""
    by_file: dict[str, list[_Piece]] = {}
    for name, tensor in described.items():
        there = 0
        for piece in tensor.pieces:
            by_file.setdefault(piece.file, []).append(piece)
            there += piece.stop - piece.start
        if math.prod(tensor.size) * tensor.dtype.itemsize > there:
            raise ValueError(f"{name}: it is larger than its pieces")
    for file, pieces in by_file.items():
        with open_regular(directory / file, follow_links=False) as opened:
            size = os.fstat(opened.fileno()).st_size
        position = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            if piece.start < position:
                raise ValueError(f"{file}: two pieces have the same bytes")
            position = piece.stop
        if position > size:
            raise ValueError(f"{file}: it is cut short: {size} bytes instead of {position}")


def _load_piece(directory: Path, name: str, piece: _Piece, dtype: torch.dtype) -> Tensor:
    with open_regular(directory / piece.file, follow_links=False) as opened:
        opened.seek(piece.start)
        content = opened.read(piece.stop - piece.start)
    values = torch_file.load(io.BytesIO(content))
    if type(values) is not Tensor or values.dtype != dtype or tuple(values.shape) != piece.sizes:
        raise ValueError(f"{name}: {piece.file} does not hold a piece of it")
    return values


def _typed(value: Any, kind: type[T], what: str) -> T:
    """Return a value of exactly this type. Raise ValueError for others, subclasses among them."""
    if type(value) is not kind:
        raise ValueError(f"there is a {type(value).__name__} where a {what} belongs")
    return value


def _fields(value: Any, kind: type[Record]) -> dict[str, Any]:
    return _typed(_typed(value, kind, kind.__name__).state, dict, kind.__name__)


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(map(is_count, value)):
        raise ValueError("there is something else where a shape belongs")
    return value
