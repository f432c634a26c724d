"""Two checkpoints, tensor by tensor."""

from pathlib import Path

import torch
from torch import Tensor

from stacey_dist.checkpoint.manifest import read_manifest
from stacey_dist.checkpoint.read import read_tensors, tensors

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differences(first: Path, second: Path) -> list[str]:
    """A line for each tensor that is not the same to the bit in both; empty for equal checkpoints.

    Engines, numbers of processes and settings may differ; only names, shapes, dtypes and bits count. One tensor of
    each is in memory at a time. Raises DamagedCheckpointError.
    """
    kinds, others = (tensors(read_manifest(path)) for path in (first, second))
    lines = []
    for name in sorted(kinds.keys() | others.keys()):
        if name not in kinds or name not in others:
            lines.append(f"{name}: only in {first if name in kinds else second}")
        elif kinds[name] != others[name]:
            (shape, dtype), (other_shape, other_dtype) = kinds[name], others[name]
            lines.append(f"{name}: {shape} {dtype} and {other_shape} {other_dtype}")
        else:
            a, b = (read_tensors(path, [name])[name] for path in (first, second))
            different = int((_bits(a) != _bits(b)).sum())
            if different:
                largest = float((a.double() - b.double()).abs().max())
                lines.append(f"{name}: {different:,} of {a.numel():,} elements differ, by {largest:.3g} at most")
    return lines


def _bits(tensor: Tensor) -> Tensor:
    """The bits as integers: NaN equals itself, and -0 is not 0."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
