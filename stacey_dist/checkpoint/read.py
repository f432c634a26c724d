"""Reading a checkpoint into a model and its optimizer, on any engine."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from stacey_dist.checkpoint.gather import scatter_tensors, shapes
from stacey_dist.checkpoint.manifest import MODEL_FILE, OPTIMIZER_FILE, DamagedCheckpointError, read_manifest, verify


def load_checkpoint(path: Path, model: nn.Module, optimizer: Any, *, verified: bool = False) -> dict[str, Any]:
    """Load weights, buffers and optimizer state in place, bit for bit; returns the manifest.

    Every rank calls it and takes its own part. The optimizer's settings (lr, ...) stay as they are: a checkpoint
    carries state, the configuration settings.

    Args:
        path: the checkpoint's directory, which all ranks can read.
        model: the model, or what its engine has made of it; names, shapes and dtypes must be the checkpoint's.
        optimizer: gets the state of the model's parameters, replacing what it has.
        verified: the files' checksums were compared already.

    Raises:
        DamagedCheckpointError: a file is missing, cut short or altered; or a tensor does not fit the model. The
            model and the optimizer are not touched then.
    """
    manifest = read_manifest(path) if verified else verify(path)
    with (
        safe_open(path / MODEL_FILE, framework="pt") as weights,
        safe_open(path / OPTIMIZER_FILE, framework="pt") as states,
    ):
        saved, here = _TensorFile(weights), shapes(model, optimizer)
        for name in sorted(saved.keys() | here.keys()):
            there, expected = _kind(saved, name), here.get(name)
            if expected is None or there is None or there[0] != expected[0] or expected[1] not in (None, there[1]):
                raise DamagedCheckpointError(f"{path}: {name} is {_text(there)} there, and {_text(expected)} here")
        state_file = _TensorFile(states)
        for full_name in state_file:
            name, key = full_name.rsplit("/", 1)
            shape = tuple(states.get_slice(full_name).get_shape())
            if name not in here or (key != "step" and shape != tuple(here[name][0])):
                raise DamagedCheckpointError(f"{path}: the state {full_name} does not fit a parameter here")
        scatter_tensors(saved, state_file, model, optimizer)
    return manifest


class _TensorFile(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.names = set(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


def _kind(saved: _TensorFile, name: str) -> tuple[torch.Size, torch.dtype] | None:
    if name not in saved.names:
        return None
    entry = saved.file.get_slice(name)
    return torch.Size(entry.get_shape()), _DTYPES[entry.get_dtype()]


# Names of dtypes in safetensors files.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def _text(kind: tuple[torch.Size, torch.dtype | None] | None) -> str:
    if kind is None:
        return "absent"
    shape, dtype = kind
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" if dtype else f"{tuple(shape)}"
