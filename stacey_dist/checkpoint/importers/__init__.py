"""Checkpoints of other makers, of runs that used Stacey, as checkpoints of ours.

These files are pickles. Here they are read with a list of harmless classes alone, so that nothing in them runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stacey_dist.checkpoint.importers import accelerate, deepspeed
from stacey_dist.checkpoint.importers.foreign import ForeignCheckpointError, Imported, check_parameters, one_line
from stacey_dist.checkpoint.shard import DTYPES
from stacey_dist.checkpoint.snapshot import Snapshot
from stacey_dist.checkpoint.write import write

_LARGEST_STEP = 2**63 - 1

__all__ = ["ForeignCheckpointError", "import_checkpoint"]


def import_checkpoint(
    source: Path,
    path: Path,
    *,
    parameters: Sequence[Sequence[str]] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write what `source` holds as the checkpoint `path`, bit for bit; returns `path`. One process calls it.

    Known are what `Accelerator.save_state` makes on one process, DDP, FSDP2 and DeepSpeed, and what DeepSpeed's
    `save_checkpoint` makes, of ZeRO-1, 2 and 3. All tensors are in this process's host memory.

    Args:
        source: the directory; of DeepSpeed, the one with the file `latest` or a tag's in it.
        path: where the checkpoint is to be; its name is step_ and the number of updates, if a run is to find it.
        parameters: the model's trainable parameters in its own order, each with all names it has (a tied one has
            several). Needed for DDP, whose optimizer's state knows no names.
        extra: goes into the manifest; "step" is the optimizer's count unless it is given.

    Raises:
        ForeignCheckpointError: it is none of these, not all there, or holds what is not read.
        OSError: the checkpoint could not be written.
    """
    try:
        found = (deepspeed if deepspeed.made(source) else accelerate).read(source, parameters)
        tensors = _tensors(source, found, parameters)
        step = max(int(state["step"]) for state in found.states.values() if "step" in state)
        if not 0 <= step <= _LARGEST_STEP:
            raise ForeignCheckpointError(f"{source}: its optimizer counts {step} updates")
    except (ForeignCheckpointError, OSError):
        raise
    except Exception as error:
        # Pickles may hold anything: what does not look as its name promises shows at the first look that fails.
        raise ForeignCheckpointError(
            f"{source}: its files do not fit together, or are not what they are named ({one_line(error)})"
        ) from error
    known = {"step": step, "skipped_steps": 0, "imported_from": found.maker}
    return write(path, Snapshot.of(tensors), known | (extra or {}))


def _tensors(source: Path, found: Imported, parameters: Sequence[Sequence[str]] | None) -> dict[str, Tensor]:
    """All tensors by their names in our checkpoints. Raises ForeignCheckpointError where some are missing."""
    check_parameters(source, found.weights, parameters or [])
    if not any("step" in state for state in found.states.values()):
        raise ForeignCheckpointError(f"{source}: there is no optimizer state with a step in it")
    tensors = {f"model/{name}": tensor for name, tensor in found.weights.items()}
    states = [tensor for state in found.states.values() for tensor in state.values()]
    for tensor in [*tensors.values(), *states]:
        if tensor.dtype not in DTYPES:
            raise ForeignCheckpointError(f"{source}: tensors of {tensor.dtype} can't be saved")
    # Files may name one tensor many times, and what follows makes copies.
    size = sum(tensor.nbytes for tensor in [*tensors.values(), *states] if tensor.dim())
    if size > sum(file.stat().st_size for file in source.rglob("*") if file.is_file()):
        raise ForeignCheckpointError(f"{source}: its tensors are larger than its files")
    for name, state in found.states.items():
        if name not in found.weights:
            raise ForeignCheckpointError(f"{source}: there is state of {name}, but no such weight")
        # Copies, as safetensors has no tensors that share memory: DeepSpeed has one step for many parameters.
        state = state | ({"step": state["step"].reshape(())} if "step" in state else {})
        tensors |= {f"optimizer/{name}/{key}": value.clone() for key, value in state.items()}
    return tensors
