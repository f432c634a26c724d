"""What importers have in common: what they return, and reading pickles without running them."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stacey_dist.checkpoint.importers import torch_file
from stacey_dist.files import open_regular


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


def load(file: Path) -> Any:
    """What torch.save wrote to `file`, tensors in host memory. Raises ForeignCheckpointError."""
    try:
        with open_regular(file) as opened:
            return torch_file.load(opened)
    except Exception as error:  # of many kinds, for files cut short, altered or of something else
        raise ForeignCheckpointError(f"{file}: it can't be read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An error's kind and the first line of its message, without the file that an OSError names."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:300]}"


def check_parameters(source: Path, weights: Container[str], parameters: Sequence[Sequence[str]]) -> None:
    """Raise ForeignCheckpointError unless every parameter of the model is there, by one of its names."""
    for names in parameters:
        if not any(name in weights for name in names):
            raise ForeignCheckpointError(f"{source}: {names[0]} is a parameter of the model, but not in the files")
