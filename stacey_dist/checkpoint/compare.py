"""Compare two checkpoints tensor by tensor."""

from pathlib import Path

from torch import Tensor

from stacey_dist.checkpoint.manifest import read_manifest
from stacey_dist.checkpoint.model_tensors import bits
from stacey_dist.checkpoint.read import batches, read_tensors, tensors


def differences(first: Path, second: Path) -> list[str]:
    """Return a line for each tensor that is not equal bit for bit in both, by name; none for equal checkpoints.

    Engines, numbers of processes and settings may differ; only names, shapes, dtypes and bits count. At most a GiB and
    one tensor of each are in memory at a time. Raises DamagedCheckpointError, OSError.
    """
    kinds, others = (tensors(read_manifest(path)) for path in (first, second))
    lines: dict[str, str] = {}
    for name in kinds.keys() | others.keys():
        if name not in kinds or name not in others:
            lines[name] = f"only in {first if name in kinds else second}"
        elif kinds[name] != others[name]:
            (shape, dtype), (other_shape, other_dtype) = kinds[name], others[name]
            lines[name] = f"{shape} {dtype} and {other_shape} {other_dtype}"
    for batch in batches({name: kind for name, kind in kinds.items() if others.get(name) == kind}):
        a, b = (read_tensors(path, batch) for path in (first, second))
        for name in batch:
            differs = bits(a[name]) != bits(b[name])
            if differs.any():
                unequal, other = (copy[name].reshape(-1)[differs].double() for copy in (a, b))
                lines[name] = _describe(unequal, other, total=len(differs))
    return [f"{name}: {lines[name]}" for name in sorted(lines)]


def _describe(first: Tensor, second: Tensor, total: int) -> str:
    """Return how many of a tensor's elements differ, and by how much; given those that do."""
    sizes = (first - second).abs()
    finite = sizes[sizes.isfinite()]
    by = [f"by {float(finite.max()):.3g} at most"] if len(finite) else []
    if others := len(sizes) - len(finite):
        by.append(f"{others:,} of them by NaN or infinity")
    return ", ".join([f"{len(sizes):,} of {total:,} elements differ", *by])
