"""The C++ kernel's arithmetic alone: one thread, on elements that stay in the processor's cache.

python benchmarks/kernel_in_cache.py
"""

import math
import statistics
import time

import torch

from stacey_dist.info import machine
from stacey_dist.optim.kernels import Call, Row
from stacey_dist.optim.kernels.cpu import find
from stacey_dist.optim.rule import StaceySettings

ELEMENTS, REPEATS, ROUNDS = 16_384, 400, 9


def main() -> None:
    torch.set_num_threads(1)
    kernel = find()
    print(f"{machine('cpu')}; {kernel.name}\n")
    print("| | ns an element on one thread, median (minimum) |\n|---|---|")
    for variant, p in (("p2", 2.0), ("p2", 3.0), ("p2", math.inf), ("p2", 2.8), ("pp", 2.8), ("2p", 2.8)):
        numbers = dict(lr=1e-2, alpha=1e-2, tau=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
        settings = StaceySettings(p=p, variant=variant, **numbers)  # type: ignore[arg-type]
        weight = torch.randn(ELEMENTS) * 0.02
        row = Row(
            weight,
            torch.randn(ELEMENTS) * 1e-3,
            weight.bfloat16(),
            torch.zeros_like(weight).bfloat16(),
            torch.zeros((), dtype=torch.int64),
        )
        nanoseconds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            kernel([row] * REPEATS, Call(settings, stochastic=True, seed=0))
            nanoseconds.append((time.perf_counter() - begin) / (ELEMENTS * REPEATS) * 1e9)
        print(f"| {variant}, p = {p:g} | {statistics.median(nanoseconds):.3f} ({min(nanoseconds):.3f}) |", flush=True)


if __name__ == "__main__":
    main()
