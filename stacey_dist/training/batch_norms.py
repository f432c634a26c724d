"""Restore the running statistics of batch norms after a skipped update: its forward pass has changed them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorms:
    """The statistics of a model's batch norms, to be kept and restored."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        # Those of one dtype go together: a network has hundreds.
        self._buffers = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copy the statistics."""
        self._kept = [_joined(buffers) for buffers in self._buffers]

    def restore(self, skipped: Tensor) -> None:
        """Restore the copies if `skipped`, a scalar on the device, is not 0: a NaN would stay for ever."""
        for buffers, kept in zip(self._buffers, self._kept, strict=False):  # none were kept before an update
            values = torch.where(skipped != 0, kept, _joined(buffers)).split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [v.view_as(buffer) for v, buffer in zip(values, buffers, strict=True)])


def _joined(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in buffers])
