"""Prepare the next update's data in a thread, and copy them to the device while it works."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ahead(Generic[T]):
    """Call `make` with each update's position, in a thread, while the update before runs.

    `stride` is the distance from one update's position to the next one's.
    """

    def __init__(self, make: Callable[[int], T], stride: int) -> None:
        self._make, self._stride = make, stride
        self._thread = ThreadPoolExecutor(1, "reads ahead")
        self._coming: tuple[int, Future[T]] | None = None

    def take(self, position: int) -> T:
        """Return what `make` returns for a position, and start the call for the next. Raises what `make` raises."""
        if self._coming is None or self._coming[0] != position:
            self._begin(position)
        assert self._coming is not None
        made = self._coming[1].result()
        self._begin(position + self._stride)
        return made

    def close(self) -> None:
        """End the thread, after what it makes."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self, position: int) -> None:
        self._coming = (position, self._thread.submit(self._make, position))


class Transfer:
    """Copies tensors to a device. To a GPU it does so beside the GPU's work, if they are in page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pinned(self, tensor: Tensor) -> Tensor:
        """Return a tensor in page-locked memory for a GPU, as it is for a CPU."""
        return tensor if self._stream is None else tensor.pin_memory()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return copies on the device, for which only the work that is launched from now on waits."""
        if self._stream is None:
            return tuple(tensor.to(self.device) for tensor in tensors)
        with torch.cuda.stream(self._stream):
            moved = tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(current)  # its memory is not another's before that work is done
        return moved
