"""Cut tensors into chunks, so that the temporaries of an update do not grow with the parameter."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements updated at a time: temporaries that stay in a CPU core's cache, or that fill a GPU.
CPU_CHUNK_PER_THREAD = 1 << 16
DEVICE_CHUNK = 1 << 22


def chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape into views of at most a chunk's elements, all in the same way.

    The rule is element-wise, so any cut gives the same result. Tensors that cannot be viewed as flat are halved
    along their longest dimension.
    """
    first = tensors[0]
    on_cpu = first.device.type == "cpu"
    size = CPU_CHUNK_PER_THREAD * torch.get_num_threads() if on_cpu else DEVICE_CHUNK
    count = first.numel()
    if count == 0:
        return
    if count <= size:
        yield tensors
        return
    if on_cpu:
        _keep_freed_memory()
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        for start in range(0, count, size):
            yield [t[start : start + size] for t in flat]
    else:
        dim = max(range(first.dim()), key=first.size)
        half = first.size(dim) // 2
        yield from chunks([t.narrow(dim, 0, half) for t in tensors])
        yield from chunks([t.narrow(dim, half, t.size(dim) - half) for t in tensors])


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep what one chunk's temporaries free for the next chunk's.

    glibc gives free memory at the end of its heap back to the system, and a page fault for every 4 KiB of it that
    is needed again takes more time than the arithmetic. The largest mapped block that was ever freed, up to
    32 MiB, sets how much it keeps (mallopt(3), M_MMAP_THRESHOLD). The block here is never touched.
    """
    torch.empty(28 << 20, dtype=torch.uint8)
