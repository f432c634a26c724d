"""Floating-point operations: those of training, and the peak of devices."""

import re

# Dense bf16 tensor throughput in FLOP/s, as the makers state it (without sparsity).
_PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the peak bf16 (fp16 on older GPUs) FLOP/s of a GPU by its name; None where it is not known."""
    for name in sorted(_PEAK_FLOPS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device_name):
            return _PEAK_FLOPS[name]
    return None


def flops_per_token(weights: int, attended: int) -> float:
    """Return a transformer's floating-point operations of forward and backward on one token, as the MFU counts them.

    6 for each of `weights`, which leave out an input embedding that is only a look-up, and experts that the token does
    not pass through. And attention, 12 for each of `attended`, the sum over layers of their width times the context:
    scores and weighted sums, not halved for the causal mask.
    """
    return 6.0 * weights + 12.0 * attended
