"""Find tensors whose memory does not hold their value, or holds fewer elements than they have.

Kernels read addresses. The value of some PyTorch tensors differs from their memory: the negative bit negates every
element, a zero tensor has no memory, a subclass computes its value from other tensors, and several elements of an
expanded tensor share one address.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN_TYPES: set[type] = {Tensor, Parameter}
_STRIDED = {torch.strided}
_is_cpu, _is_cuda, _is_nested, _layout = map(attrgetter, ("is_cpu", "is_cuda", "is_nested", "layout"))


def is_plain(kind: type) -> bool:
    """Return whether a type of tensor has its value in its memory: torch's own, or a Parameter that adds names only."""
    if kind in _PLAIN_TYPES:
        return True
    adds_names = issubclass(kind, Parameter) and all(
        getattr(kind, name) is getattr(Parameter, name) for name in ("__torch_function__", "__torch_dispatch__")
    )
    if adds_names:
        _PLAIN_TYPES.add(kind)
    return adds_names


def full_tensor(tensor: Any) -> Any:
    """Return the full tensor of a DTensor, for which all ranks call it together; any other value unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory, once it has arrived; any other tensor as it is."""
    if is_plain(type(tensor)):
        return tensor
    to_local = getattr(tensor, "to_local", None)
    if to_local is not None:
        tensor = to_local()
    if type(tensor).__name__ == "AsyncCollectiveTensor":  # the result of a collective that may still be under way
        tensor = tensor.wait()  # type: ignore[attr-defined]
    return tensor


def are_simple(tensors: Sequence[Tensor]) -> bool:
    """Return whether all are plain, on a CPU or GPU, contiguous, and have their values in their memory, as most do.

    Then `local` and `readable` return the tensor itself, kernels may take it, and there is no `defect`, unless the
    storage is cut short. An optimizer asks for all tensors in each step; `map` takes a third of a loop's time.
    """
    return (
        _PLAIN_TYPES.issuperset(map(type, tensors))
        and (all(map(_is_cpu, tensors)) or all(map(_is_cuda, tensors)))
        and not any(map(_is_nested, tensors))
        and _STRIDED.issuperset(map(_layout, tensors))
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and (all(map(Tensor.data_ptr, tensors)) or all(t.data_ptr() != 0 or t.numel() == 0 for t in tensors))
    )


def fill_their_storages(tensors: Sequence[Tensor]) -> bool:
    """Return whether no storage ends before its tensor does, for tensors that `are_simple`."""
    return all(t.storage_offset() * t.itemsize + t.nbytes <= t.untyped_storage().nbytes() for t in tensors)


def readable(tensor: Tensor) -> Tensor:
    """Return a tensor of the same value whose memory holds it: the tensor itself, or a copy."""
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_neg()


def defect(tensor: Tensor) -> str | None:
    """Return why a tensor can't be updated in place; None if it can. Its dtype is not checked."""
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_nested:
        return "it is a nested tensor"
    if not is_plain(type(tensor)):  # a subclass has its own memory
        return None
    if tensor._is_zerotensor():
        return "it is a zero tensor without memory; clone() it"
    if is_cut_short(tensor):
        return "its storage holds fewer elements than it has; the storage was resized"
    if not tensor.is_contiguous() and overlaps(tensor):
        return "more than one of its elements refers to a single memory location; clone() it"
    return None


def is_cut_short(tensor: Tensor) -> bool:
    """Return whether a plain tensor's storage ends before its last element; False where that is not known."""
    if tensor.device.type not in ("cpu", "cuda") or tensor.numel() == 0:
        return False
    last = tensor.numel() - 1
    if not tensor.is_contiguous():
        last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes()


def overlaps(tensor: Tensor) -> bool:
    """Return whether two elements of a strided tensor lie at one address."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:  # the dimensions interleave: elements may still lie apart
            return stride == 0 or _count_addresses(tensor) < tensor.numel()
        reach += stride * (size - 1)
    return False


def _count_addresses(tensor: Tensor) -> int:
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size, device="cpu")).reshape(-1).unique()
    return len(offsets)
