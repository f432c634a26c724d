"""The plain rule against straightforward eager versions of STACEY(p,2), and torch's AdamW for scale.

    python benchmarks/optimizer_step.py [--elements N] [--p P] [--rounds N]

The eager versions do the same for the user (bfloat16 states, rounded stochastically where it says so), written as
one would: whole tensors and torch's own functions.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import torch
from measure import in_turns, machine, median_and_minimum
from torch import Tensor

from stacey_dist import Stacey

LR, ALPHA, TAU, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-2, 1e-2, 1e-3, 0.9, 0.99, 1e-8, 0.1


class EagerStacey:
    """STACEY(p,2) line by line as the paper has it."""

    def __init__(self, param: Tensor, p: float, stochastic: bool) -> None:
        self.param, self.p, self.stochastic = param, p, stochastic
        self.z = param.detach().to(torch.bfloat16)
        self.m = torch.zeros_like(self.z)

    @torch.no_grad()
    def step(self) -> None:
        theta, g = self.param, self.param.grad
        assert g is not None
        z, m = self.z.float(), self.m.float()
        c = BETA1 * m + (1 - BETA1) * g
        m = BETA2 * m + (1 - BETA2) * g
        exponent = 1.0 if self.p == math.inf else (self.p - 2) / (self.p - 1)
        y = theta - LR * c / (c.abs() ** exponent + EPS)
        z = z - ALPHA * c
        theta.copy_(TAU * z + (1 - TAU) * y - LR * WEIGHT_DECAY * theta)
        self.store(self.z, z)
        self.store(self.m, m)

    def store(self, target: Tensor, value: Tensor) -> None:
        if self.stochastic:
            noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
            value = ((value.view(torch.int32) + noise) & -0x10000).view(torch.float32)
        target.copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elements", type=int, default=1 << 25)
    parser.add_argument("--p", type=float, nargs="+", default=[2.8, 3.0, math.inf])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine())
    print(f"{arguments.elements:,} elements in one tensor, {arguments.rounds} rounds; ns per element")
    for p in arguments.p:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(arguments.elements, device=device) * 0.02)
        param.grad = torch.randn(arguments.elements, device=device) * 1e-3
        settings = dict(lr=LR, p=p, alpha=ALPHA, tau=TAU, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY)
        rivals: dict[str, Callable[[], object]] = {
            "stacey_dist, plain rule": Stacey([param], **settings).step,
            "eager, stochastic rounding": EagerStacey(param, p, stochastic=True).step,
            "eager, rounding to nearest (loses z)": EagerStacey(param, p, stochastic=False).step,
            "torch AdamW, fused, fp32 states": torch.optim.AdamW([param], lr=1e-3, fused=True).step,
        }
        seconds = in_turns(rivals, arguments.rounds)
        own = seconds["stacey_dist, plain rule"]
        print(f"\np = {p:g}{'':34}   median   minimum   ratio of medians")
        for name, values in seconds.items():
            ratio = statistics.median(values) / statistics.median(own)
            print(f"  {name:38}{median_and_minimum(values, arguments.elements * 1e-9)}   {ratio:8.2f}")


if __name__ == "__main__":
    main()
