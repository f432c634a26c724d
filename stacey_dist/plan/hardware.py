"""GPUs and the links between them, as their makers state them. Nothing here was measured; every figure is an option.

Bandwidths are of one direction, in bytes a second.
"""

from dataclasses import dataclass

from stacey_dist.errors import unknown
from stacey_dist.training.reports.flops import peak_flops

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node.

    Attributes:
        name: what `--gpu` calls it.
        memory: bytes, the name's figure in 10^9. Cards have a little more, which the CUDA context and NCCL take.
        flops: dense bfloat16 operations a second, the figure by which `train_llm.py` gives its MFU.
        float32_flops: operations a second in float32 without tensor cores, as torch computes by default.
        memory_bandwidth: bytes a second to and from its own memory.
        intra: to the other GPUs of the node (NVLink; PCIe where there is none).
        inter: to other nodes, a GPU's share of the node's network cards: one of 400 Gbit/s for each GPU beside
            Hopper and Blackwell, 200 beside Ampere, and for PCIe cards 25 (an assumption: they come in all kinds
            of nodes).
        host: to and from host memory (PCIe, 16 lanes).
        efficiency: the least and the largest share of its peak that forward and backward reach, see `_EFFICIENCY`.
    """

    name: str
    memory: float
    flops: float
    float32_flops: float
    memory_bandwidth: float
    intra: float
    inter: float
    host: float
    efficiency: tuple[float, float]


# From the table of published runs in docs/how-to/plan.md: the efficiency of the slowest run if none of its
# communication was hidden, and of the fastest if all was, each with a margin of 5 percentage points. An H200 computes
# like an H100.
_EFFICIENCY = {"A100": (0.5, 0.8), "H100": (0.4, 0.65), "H200": (0.4, 0.65)}
_OF_OTHERS = (0.4, 0.8)  # no published run: the whole range of those


def _gpu(
    name: str, model: str, memory: float, float32: float, own: float, intra: float, inter: float, host: float
) -> Gpu:
    flops = peak_flops(model)
    assert flops is not None
    efficiency = _EFFICIENCY.get(model, _OF_OTHERS)
    return Gpu(name, memory * GB, flops, float32 * 1e12, own * GB, intra * GB, inter * GB, host * GB, efficiency)


GPUS = {
    gpu.name: gpu
    for gpu in (
        #              the makers' model    GB  TFLOP/s   GB/s: own  intra  inter  host
        _gpu("a100-40gb", "A100", 40, 19.5, 1555, 300, 25, 32),
        _gpu("a100-80gb", "A100", 80, 19.5, 2039, 300, 25, 32),
        _gpu("h100-80gb", "H100", 80, 67, 3350, 450, 50, 64),
        _gpu("h200-141gb", "H200", 141, 67, 4800, 450, 50, 64),
        _gpu("b200-180gb", "B200", 180, 80, 8000, 900, 50, 64),
        _gpu("l40s-48gb", "L40S", 48, 91.6, 864, 32, 3.125, 32),
        _gpu("rtx4090-24gb", "RTX 4090", 24, 82.6, 1008, 32, 3.125, 32),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name. Raises SettingsError, with the nearest name, for another one."""
    if name not in GPUS:
        raise unknown("--gpu", name, GPUS, spelled=name.lower(), cutoff=0.3)
    return GPUS[name]
