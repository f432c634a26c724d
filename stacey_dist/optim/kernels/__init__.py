"""Translations of the rule that take one pass over memory: C++ for CPUs, Triton for GPUs.

Each gives the bits of the plain rule (`rule.py`, `power.py`, `rounding.py`). `Kernel` is their interface; `find`
returns the one for a device.
"""

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stacey_dist.optim.memory import is_plain, local
from stacey_dist.optim.rule import StaceySettings

DTYPES = (torch.float32, torch.bfloat16)


class Row(NamedTuple):
    """One parameter's tensors, all of one shape, which a kernel updates in place, and its count of updates (int64)."""

    weight: Tensor
    gradient: Tensor
    z: Tensor
    m: Tensor
    step: Tensor

    @classmethod
    def of(cls, weight: Tensor, gradient: Tensor, state: dict[str, Any]) -> "Row":
        """Return the row of a parameter's part on this rank, with its optimizer state."""
        return cls(weight, gradient, local(state["z"]), local(state["m"]), state["step"])


@dataclass(frozen=True, slots=True)
class Call:
    """The settings that all rows of one launch share."""

    settings: StaceySettings
    stochastic: bool
    seed: int
    grad_scale: Tensor | None = None
    """Gradients are first multiplied by its reciprocal, rounded to float32."""
    capturable: bool = False
    """The step counts, `lr` and `found_inf` are on the device; the host does not wait for them."""
    lr: Tensor | None = None
    """Takes the place of `settings.lr`, for a kernel that is `capturable`."""
    lr_reference: float | None = None
    """With `lr`: the learning rate at which `settings.alpha` and `settings.tau` hold; see `rule.scale_with_lr`."""
    found_inf: Tensor | None = None
    """For a kernel that is `capturable`: nothing changes unless it is 0."""


class Kernel(Protocol):
    """One update of many parameters."""

    name: str
    """A human-readable name, as "C++ for AVX-512"."""

    def __call__(self, rows: list[Row], call: Call) -> None:
        """Update the rows in place and increment their step counts. All rows have one `launch_key`."""
        ...


class NoKernelError(RuntimeError):
    """There is no kernel for a device here; the message says why."""


def find(device_type: str) -> Kernel:
    """Return the kernel for tensors on a device of this type ("cpu", "cuda"), or raise NoKernelError."""
    module = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
    if module is None:
        raise NoKernelError(f"no kernel is written for devices of type {device_type}")
    kernel: Kernel = importlib.import_module(f"stacey_dist.optim.kernels.{module}").find()
    return kernel


def apart(rows: list[Row], addresses: list[int]) -> list[tuple[list[Row], list[int]]]:
    """Return the rows, and the addresses of their weights, in launches that have no weight twice.

    The rows of one launch are updated at the same time. Two parameters may share their memory.
    """
    repeats = len(addresses) - len(set(addresses))
    if repeats == max(0, addresses.count(0) - 1):  # of weights without elements alone, whose address is 0
        return [(rows, addresses)]
    launches: list[tuple[list[Row], list[int]]] = []
    times: Counter[int] = Counter()
    for row, address in zip(rows, addresses, strict=True):
        turn = times[address] if address else 0
        times[address] += 1
        if turn == len(launches):
            launches.append(([], []))
        launches[turn][0].append(row)
        launches[turn][1].append(address)
    return launches


def is_capturing() -> bool:
    """Return whether work becomes part of a CUDA graph, in which the host cannot read what is on the device."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def launch_key(row: Row) -> tuple[int, torch.dtype, torch.dtype, torch.dtype] | None:
    """Return what rows of one launch have in common: device index, and dtypes of weight, gradient and states.

    None if there is a `refusal`. Raises ValueError where a state has another shape or device than its parameter:
    kernels go by addresses alone.
    """
    weight, gradient, z, m, _ = row
    tensors = row[:4]
    shape, device = weight.shape, weight.get_device()
    if not (shape == z.shape == m.shape == gradient.shape and z.get_device() == device == m.get_device()):
        shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise ValueError(f"a parameter, its gradient, z and m must have one shape and device, and are {shapes}")
    return None if refusal(tensors) else (device, weight.dtype, gradient.dtype, z.dtype)


def refusal(tensors: Sequence[Tensor]) -> str | None:
    """Return why a kernel can't take a parameter's tensors, the parameter first; None if it can."""
    are_contiguous = True
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"a parameter, gradient or state of {tensor.dtype} is neither float32 nor bfloat16"
        if not is_plain(type(tensor)):
            return f"a {type(tensor).__name__} is not a plain tensor"
        if tensor.is_neg() or (tensor.data_ptr() == 0 and tensor.numel() > 0):  # functional tensors have no address
            return (
                f"the memory of a tensor of shape {tuple(tensor.shape)} is not its value (negative bit, or no memory)"
            )
        are_contiguous = are_contiguous and tensor.is_contiguous()
    if not are_contiguous:
        # Any other dense order will do, channels_last for one, if it is the same for all.
        first = tensors[0]
        if any(tensor.stride() != first.stride() for tensor in tensors) or not _dense(first):
            return f"a parameter of shape {tuple(first.shape)} has gaps, or another order in memory than its gradient"
    return None


def _dense(tensor: Tensor) -> bool:
    """Return whether the elements lie side by side, in any order of the dimensions."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).is_contiguous()
