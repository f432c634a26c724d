"""A model with every awkward shape, gradients that are exact on any engine, and what one process makes of them."""

import functools

import torch
from torch import nn

from stacey_dist import LpDescent, Stacey

STEPS = 8
LR = 0.02

# Each group differs from the other in every way that an engine could lose.
SECOND_GROUP = {"p": 4.0, "weight_decay": 0.1, "tau": 0.05, "alpha": 0.02, "state_dtype": "float32", "lr": 0.5 * LR}

# Large enough for an error anywhere to show.
SETTINGS = {"p": 2.8, "lr": LR, "tau": 0.02, "alpha": 1.0, "betas": (0.5, 0.7)}
CASES = {
    f"{variant}-{rounding}": (Stacey, {"variant": variant, "rounding": rounding, **SETTINGS})
    for variant in ("p2", "pp", "2p")
    for rounding in ("stochastic", "nearest")
} | {"lp_descent": (LpDescent, {"p": 2.8, "lr": LR})}


class Term(nn.Module):
    """One parameter; the loss is linear in it, so its gradient is what forward is given, on every rank."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 0.02)

    def forward(self, g):
        return (self.weight * g.to(self.weight)).sum()


class Awkward(nn.Module):
    """Primes, one element, a scalar, fewer rows than ranks, a large one, a tied pair, a frozen one."""

    def __init__(self, scalar=True):
        super().__init__()
        torch.manual_seed(0)
        shapes = {
            "large": (97, 61),
            "primes": (7, 13),
            "cube": (3, 5, 2),
            "vector": (11,),
            "one": (1,),
            "few_rows": (2, 5),
            "frozen": (5, 3),
            "last": (17,),
        }
        if scalar:
            shapes["scalar"] = ()
        for name, shape in shapes.items():
            self.add_module(name, Term(*shape))
        self.tied = Term(7, 13)
        self.tied.weight = self.primes.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, gradients):
        return sum(term(gradients[name]) for name, term in self.named_children())


def groups(model):
    """Two groups of the trainable parameters, the second with settings of its own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    second = ("vector", "few_rows", "scalar", "one")
    return [
        {"params": [p for name, p in named if not name.startswith(second)]},
        {"params": [p for name, p in named if name.startswith(second)], **SECOND_GROUP},
    ]


def group_settings(case):
    """`groups` for a case: LpDescent has fewer settings."""
    optimizer_class, _ = CASES[case]

    def make(model):
        first, second = groups(model)
        if optimizer_class is LpDescent:
            second = {key: value for key, value in second.items() if key in ("params", "p", "weight_decay", "lr")}
        return [first, second]

    return make


def gradients(step, model):
    """A gradient for each term: multiples of 12 with a 3-bit number, so that sums and means over 1 to 4 ranks are
    exact in bfloat16, in any order; some are exactly zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    result = {}
    for name, term in model.named_children():
        shape = shapes(term)
        number = torch.randint(-7, 8, shape, generator=generator)
        exponent = torch.randint(-14, -8, shape, generator=generator)
        result[name] = 12.0 * number * 2.0**exponent
    result["tied"] = result["primes"]
    return result


def shapes(term):
    """The shape of a term's whole parameter, whatever an engine has made of it."""
    return getattr(term.weight, "ds_shape", term.weight.shape)


def schedule(step):
    """The share of the peak learning rate of update `step`: warm-up, then decay."""
    return min(1.0, (step + 1) / 5) * (1.0 - 0.03 * step)


@functools.cache
def one_process(case, scalar=True, start_dtype=torch.float32, steps=STEPS, scheduled=True):
    """(weight, state) by parameter name after `steps` updates by the optimizer alone, in float32 master weights."""
    optimizer_class, settings = CASES[case]
    model = Awkward(scalar).to(start_dtype).float()
    optimizer = optimizer_class(group_settings(case)(model), **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule if scheduled else lambda step: 1.0)
    for step in range(steps):
        optimizer.zero_grad()
        model(gradients(step, model)).backward()
        optimizer.step()
        scheduler.step()
    return {name: (p.detach(), dict(optimizer.state[p])) for name, p in model.named_parameters() if p.requires_grad}
