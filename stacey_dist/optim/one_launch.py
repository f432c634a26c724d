"""The usual step: one launch of a kernel takes all parameters of a group.

Their tensors are checked column by column (`map`), which takes a third of the time of a loop over the parameters.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stacey_dist.optim.kernels import DTYPES, Row
from stacey_dist.optim.memory import are_simple, local

_dtype, _is_cuda, _shape = map(attrgetter, ("dtype", "is_cuda", "shape"))
_KERNELS_TAKE = set(DTYPES)


class Parts(NamedTuple):
    """The parameters of one group that have a gradient."""

    params: list[Tensor]
    weights: list[Tensor]
    """This rank's part of each parameter."""
    gradients: list[Tensor]
    """This rank's part of each gradient."""
    are_simple: bool
    """Whether `memory.are_simple` says so of all of them."""


def rows_of_one_launch(
    parts: Parts, states: Sequence[dict[str, Any]], state_dtype: torch.dtype, capturable: bool
) -> list[Row] | None:
    """Return the rows of all parts, in one launch; None where each part is to be looked at.

    Args:
        parts: of one group.
        states: the optimizer state of each part.
        state_dtype: what the group's states are to have.
        capturable: whether the counts of steps are to be on the GPU.
    """
    _, weights, gradients, simple = parts
    zs, ms, steps = ([state[name] for state in states] for name in ("z", "m", "step"))
    if not simple:
        zs, ms = list(map(local, zs)), list(map(local, ms))
    tensors = weights + gradients + zs + ms
    shapes = list(map(_shape, weights))
    dtypes = [set(map(_dtype, column)) for column in (weights, gradients, zs, ms)]
    is_one_launch = (
        are_simple(zs + ms if simple else tensors)
        and {state_dtype} == dtypes[2] == dtypes[3]
        and all(len(found) == 1 and found <= _KERNELS_TAKE for found in dtypes)
        and len(set(map(Tensor.get_device, tensors))) == 1
        and all(shapes == list(map(_shape, column)) for column in (gradients, zs, ms))
        and {Tensor} == set(map(type, steps))
        and {torch.int64} == set(map(_dtype, steps))
        and {capturable} == set(map(_is_cuda, steps))
    )
    return list(map(Row, weights, gradients, zs, ms, steps)) if is_one_launch else None
