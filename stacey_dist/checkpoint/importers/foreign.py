"""Code that the importers share: what they return, and how they read files."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from stacey_dist.checkpoint.importers import torch_file
from stacey_dist.errors import one_line
from stacey_dist.files import open_regular

T = TypeVar("T")


class ForeignCheckpointError(Exception):
    """A checkpoint of another maker that can't be imported; the message says what is in the way."""


@dataclass
class Imported:
    """A foreign checkpoint as whole tensors, by the names of the model's parameters and buffers."""

    maker: str
    """Who wrote it, as text."""
    weights: dict[str, Tensor]
    """Parameters (fp32 masters where there are some) and buffers."""
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The optimizer's tensors of each parameter by their keys, with `step`."""
    groups: list[list[dict[str, Tensor]]] | None = None
    """The same where the files have no names: the states of each parameter group, in the order of the group."""


def load(file: Path) -> Any:
    """Return what torch.save wrote to `file`, tensors in host memory. Raises ForeignCheckpointError."""
    with reading(file), open_regular(file) as opened:
        return torch_file.load(opened)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ForeignCheckpointError naming `path` for errors of any kind, as of files cut short, altered or missing."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, OSError) and error.filename == str(path):  # which its message names once more
            reason = f"{type(error).__name__}: {error.strerror}"
        raise ForeignCheckpointError(f"{path}: it can't be read: {reason}") from error


def renamed(path: Path, values: dict[str, T], rename: Callable[[str], str]) -> dict[str, T]:
    """Return values by other names. Raises ForeignCheckpointError where two would have the same."""
    by_name = {rename(name): value for name, value in values.items()}
    if len(by_name) != len(values):
        names = ", ".join(sorted(values)[:6])
        raise ForeignCheckpointError(f"{path}: two of its tensors would have one name: {names}, ...")
    return by_name


def check_size(source: Path, tensors: Iterable[Any]) -> None:
    """Raise ForeignCheckpointError if tensors are larger than the files: one may be named many times."""
    size = sum(tensor.nbytes for tensor in tensors if tensor.dim())
    if size > sum(file.stat().st_size for file in source.rglob("*") if file.is_file()):
        raise ForeignCheckpointError(f"{source}: its tensors are larger than its files")
