"""Read what `torch.save` wrote, without torch's own reader.

The file is a zip archive, uncompressed, with a pickle (`data.pkl`) and one member for each storage (`data/KEY`).
Nothing is loaded but plain tensors, and each has to lie within its storage. Versions of torch differ in what
`torch.load(weights_only=True)` is proof against; this reader is the same with all of them.
"""

import reprlib
import zipfile
from typing import Any, BinaryIO

import torch
from torch import Tensor

from stacey_dist.checkpoint.schema import is_count
from stacey_dist.safe_pickle import Function, Ordered, record, unpickle

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
DTYPES = {("torch", n): v for n, v in vars(torch).items() if isinstance(v, torch.dtype) and str(v) == f"torch.{n}"}


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if type(sizes) is not tuple:
        raise ValueError("the shape or strides of a tensor are invalid")
    return sizes


# These do not copy their arguments: a pickle can pass the same list to a thousand calls.
SIZE = Function(_size)
ORDERED = Function(Ordered)
SET = Function(lambda values=(): values)
_PLAIN = {
    ("collections", "OrderedDict"): ORDERED,
    ("collections", "Counter"): record("Counter"),
    ("torch", "Size"): SIZE,
    ("torch", "device"): record("torch.device"),
    ("builtins", "set"): SET,
    ("__builtin__", "set"): SET,
}
# Classes of DeepSpeed's that are in its files beside the tensors.
_BESIDE = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


class _Archive:
    """The members of the archive, and the tensors that are made of them."""

    def __init__(self, opened: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(opened)
        self._storages: dict[str, Tensor] = {}
        members = self._zip.infolist()
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise ValueError("it has two members of one name")
        size = opened.seek(0, 2)
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("it is compressed")  # a small file could have any size then
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is not what torch.save writes")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in names and self._zip.read(f"{self._root}byteorder") != b"little":
            raise ValueError("it is of a machine of another byte order")

    def load(self) -> Any:
        """Return what the pickle holds."""
        known: dict[tuple[str, str], Any] = {
            **DTYPES,
            **_PLAIN,
            **{name: record(name[1]) for name in _BESIDE},
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            ("torch.storage", "UntypedStorage"): torch.uint8,
            ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
            ("torch._utils", "_rebuild_tensor_v3"): Function(_typed_tensor),
            ("torch._utils", "_rebuild_parameter"): Function(_parameter),
            ("torch._utils", "_rebuild_parameter_with_state"): Function(_parameter),
            ("torch._tensor", "_rebuild_from_type_v2"): Function(_with_attributes),
            ("torch", "Tensor"): record("Tensor"),
            ("torch.nn.parameter", "Parameter"): record("Parameter"),
        }
        return unpickle(self._zip.read(f"{self._root}data.pkl"), known, self._storage)

    def _storage(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor of its dtype."""
        kind, dtype, key, _, count = pid if type(pid) is tuple else ()
        if kind != "storage" or type(dtype) is not torch.dtype or type(key) is not str or not is_count(count):
            raise ValueError(f"it refers to {reprlib.repr(kind)}, which is no storage")
        if key not in self._storages:
            member = self._zip.getinfo(f"{self._root}data/{key}")
            content = torch.empty(member.file_size, dtype=torch.uint8)
            with self._zip.open(member) as opened:
                values: Any = content.numpy()
                read = opened.readinto(values) if member.file_size else 0  # type: ignore[attr-defined]
                rest = opened.read(1)  # at the end zipfile compares the checksum
            if read != member.file_size or rest:
                raise ValueError(f"storage {key} is cut short")
            self._storages[key] = content
        content = self._storages[key]
        if content.numel() != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {content.numel()} bytes instead of {count * dtype.itemsize}")
        return content.view(dtype)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _requires_grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """Return a tensor in a storage of bytes."""
    if type(storage) is not Tensor or storage.dtype != torch.uint8 or type(dtype) is not torch.dtype:
        raise ValueError("a tensor is made of something that is no storage")
    return _tensor(storage.view(dtype), offset, size, stride)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a tensor in a storage; no element may lie outside of it, and no two elements in one place."""
    if type(storage) is not Tensor:
        raise ValueError("a tensor is made of something that is no storage")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > 64:
        raise ValueError("the shape or strides of a tensor are invalid")
    if not is_count(offset) or not all(map(is_count, size + stride)):
        raise ValueError("the shape or strides of a tensor are invalid")
    if 0 in size:
        return torch.empty(size, dtype=storage.dtype)
    # From the shortest stride to the longest, each step has to be longer than all before it taken together.
    reach = 0
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count > 1):
        if step <= reach:
            raise ValueError("two elements of a tensor share one location")
        reach += step * (count - 1)
    if offset + reach >= storage.numel():
        raise ValueError("a tensor lies outside of its storage")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    if type(data) is not Tensor:
        raise ValueError("a parameter is made of something that is no tensor")
    return data


def _with_attributes(rebuild: Any, _: Any, arguments: Any, *__: Any) -> Tensor:
    """Return a tensor without its attributes (DeepSpeed gives it some)."""
    if type(rebuild) is not Function or type(arguments) is not tuple:
        raise ValueError("a tensor is rebuilt by something other than a known function")
    return _parameter(rebuild(*arguments))


def load(opened: BinaryIO) -> Any:
    """Return what `torch.save` wrote: tensors in host memory, and dictionaries, lists, tuples, texts and numbers.

    OrderedDict comes back as dict, Size as tuple, set as list; Counter and classes of DeepSpeed's as objects that do
    nothing.

    Raises:
        Exception: the file is damaged or something else, or holds what is none of these.
    """
    return _Archive(opened).load()
