"""What the host does in a step of many tensors on a GPU, measured without one.

    python benchmarks/host_cost.py [--tensors N [N ...]]

The Triton kernel's part is all that comes before its launch, on CPU tensors whose gradients move in each step, as where
each backward pass makes new ones. The launch itself is left out: it costs the same for any number of tensors.
Beside it is a step of torch's fused AdamW on CPU tensors of one element, which is little more than its host's part.
"""

import argparse
import os
import time
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it as it is imported

import torch
from torch.utils.benchmark import Timer

from stacey_dist.info import machine
from stacey_dist.optim import Stacey, base
from stacey_dist.optim.kernels import Call, Row, apart
from stacey_dist.optim.kernels.triton import TritonKernel


class HostPart(TritonKernel):
    """The kernel without its launch."""

    def __call__(self, rows: list[Row], call: Call) -> None:
        ((launched, addresses),) = apart(rows, [row.weight.data_ptr() for row in rows])
        self._prepare(launched, addresses, call)
        torch.autograd.graph.increment_version([row.weight for row in rows])


class Steps:
    """Steps of an optimizer over so many tensors, each with other gradients than the one before."""

    def __init__(self, count: int, optimizer_class: Any, **settings: Any) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(count)]
        self.gradients = [[torch.ones(1) for _ in self.params] for _ in range(2)]
        self.optimizer = optimizer_class(self.params, **settings)
        self.number = 0
        self.step()
        if optimizer_class is Stacey:
            self.kernel = HostPart()
            self.call = self.optimizer._kernel_call(self.optimizer.param_groups[0])
            states = [self.optimizer.state[param] for param in self.params]
            self.rows = [
                [
                    Row(param, gradient, state["z"], state["m"], state["step"])
                    for param, gradient, state in zip(self.params, gradients, states, strict=True)
                ]
                for gradients in self.gradients
            ]

    def step(self) -> None:
        for param, gradient in zip(self.params, self.gradients[self.number % 2], strict=True):
            param.grad = gradient
        self.number += 1
        self.optimizer.step()

    def launch(self) -> None:
        self.number += 1
        self.kernel(self.rows[self.number % 2], self.call)

    def set_gradients(self) -> None:
        for param, gradient in zip(self.params, self.gradients[0], strict=True):
            param.grad = gradient


def microseconds(function: str, steps: Steps) -> float:
    """The least of many short means, of the process's own time: what else the machine does only adds to them."""
    timer = Timer(f"steps.{function}()", globals={"steps": steps}, timer=time.process_time)
    number = max(1, 1000 // len(steps.params))
    return min(timer.timeit(number).mean for _ in range(200)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensors", type=int, nargs="+", default=[111, 1111])
    counts = parser.parse_args().tensors
    kernel = HostPart()
    base.kernel = lambda device_type: kernel  # type: ignore[assignment]
    print(machine("cpu"))
    found: dict[str, list[float]] = {}
    for count in counts:
        stacey, adamw = Steps(count, Stacey), Steps(count, torch.optim.AdamW, fused=True)
        setting = microseconds("set_gradients", stacey)  # in each step, and no part of it
        found.setdefault("Triton kernel, before its launch", []).append(microseconds("launch", stacey))
        found.setdefault("Stacey.step, without the launch", []).append(microseconds("step", stacey) - setting)
        found.setdefault("torch AdamW, fused, step", []).append(microseconds("step", adamw) - setting)
    print(f"{'microseconds, tensors:':36}" + "".join(f"{count:>10}" for count in counts) + "  each further")
    for name, values in found.items():
        further = (values[-1] - values[0]) / (counts[-1] - counts[0]) if len(counts) > 1 else float("nan")
        print(f"{name:36}" + "".join(f"{value:10.1f}" for value in values) + f"{further:14.2f}")


if __name__ == "__main__":
    main()
