"""Scale tau and alpha with the learning rate, for `Stacey(lr_reference=...)`.

    share = lr / lr_reference        tau' = min(1, tau share)        alpha' = alpha share

The paper's tau and alpha are constant: at lr = 0 a weight still moves, toward z. Here lr = 0 leaves weights and z
exactly as they are.
"""

import torch
from torch import Tensor

from stacey_dist.optim.power import log2_parts
from stacey_dist.optim.rule import MAX_LOG2_ALPHA, log2_in_parts


def follow(lr: Tensor, reference: float, alpha: float, tau: float, dtype: torch.dtype) -> Tensor:
    """Return alpha', tau' and log2(alpha') as (whole, fraction): four float64 numbers on lr's device.

    These are IEEE-754 operations and `log2_parts`, so the host and a GPU work out the same bits.

    Args:
        lr: the learning rate, a float64 tensor of shape (1,).
        reference: the learning rate at which alpha and tau hold.
        alpha: the dual step size at the reference.
        tau: the coupling at the reference.
        dtype: float32 or float64, in which the update is computed; the share is rounded to it.
    """
    # Not by a number of the host: CUDA would multiply by its reciprocal.
    share = (lr / torch.full_like(lr, reference)).to(dtype)
    whole, fraction = (part.double() for part in log2_parts(share))
    alpha_whole, alpha_fraction = log2_in_parts(alpha)
    fraction += alpha_fraction  # within [-1, 2]; its integer part is moved to `whole`
    carry = fraction.round()
    whole = (whole + alpha_whole + carry).clamp(max=MAX_LOG2_ALPHA)
    share = share.double()
    return torch.cat([share * alpha, (share * tau).clamp(max=1.0), whole, fraction - carry])
