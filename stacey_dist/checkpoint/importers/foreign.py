"""What importers have in common: what they return, and reading pickles without running them."""

import pickle
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


class ForeignCheckpointError(Exception):
    """A checkpoint of another maker that can't be imported; the message says what is in the way."""


@dataclass
class Imported:
    """A foreign checkpoint, as whole tensors by the names of the model's parameters and buffers."""

    maker: str
    """Whose it is, for people."""
    weights: dict[str, Tensor]
    """Parameters (fp32 masters where there are some; a tied one once) and buffers."""
    states: dict[str, dict[str, Tensor]]
    """The optimizer's tensors of each parameter by their keys, with `step`."""


class _Stub:
    """Stands in for a class of DeepSpeed's that is in its files beside the tensors, and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


_STUBS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def load(file: Path) -> Any:
    """What torch.save wrote to `file`, tensors in host memory. Raises ForeignCheckpointError."""
    stubs: list[Any] = [(type(name.rpartition(".")[2], (_Stub,), {}), name) for name in _STUBS]
    try:
        with torch.serialization.safe_globals(stubs):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for files cut short, altered or of something else
        reason = str(error).splitlines()
        told = next((line for line in reason if "Unsupported global" in line), reason[0] if reason else "")
        raise ForeignCheckpointError(f"{file}: it can't be read: {told}") from error


def check_parameters(source: Path, weights: Container[str], parameters: Sequence[Sequence[str]]) -> None:
    """Raise ForeignCheckpointError unless every parameter of the model is there, by one of its names."""
    for names in parameters:
        if not any(name in weights for name in names):
            raise ForeignCheckpointError(f"{source}: {names[0]} is a parameter of the model, but not in the files")


_METADATA = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class MetadataUnpickler(pickle.Unpickler):
    """Reads the `.metadata` of torch.distributed.checkpoint, and refuses any class that has no place there."""

    def __init__(self, opened: IO[bytes]) -> None:
        super().__init__(opened)

    def find_class(self, module: str, name: str) -> Any:
        """Only what describes tensors and files."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _METADATA or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
