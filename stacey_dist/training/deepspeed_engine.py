"""`DeepSpeedEngine`, the engine of ZeRO-1, 2 and 3."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.optim import Optimizer

from stacey_dist.training.engine import Engine
from stacey_dist.training.initial_weights import allocate
from stacey_dist.training.processes.launch import compute_dtype, shards_weights
from stacey_dist.training.processes.launch_settings import configuration_errors


class DeepSpeedEngine(Engine):
    """The model and its optimizer on DeepSpeed, which sums, clips, scales and applies gradients by itself."""

    def _prepare(self, optimizer: Optimizer) -> None:
        exact = [(module, name, buffer) for module in self.module.modules() for name, buffer in module._buffers.items()]
        with configuration_errors("the DeepSpeed configuration"):
            if shards_weights(self.accelerator):
                self._partition()
            self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        # As FSDP2 does. DeepSpeed casts the weights alone.
        dtype = compute_dtype(self.accelerator)
        if dtype != torch.float32:
            self.module.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)
        # DeepSpeed casts the buffers too: rotary frequencies and batch norms' statistics need their float32.
        for module, name, buffer in exact:
            if buffer is not None:
                module._buffers[name] = buffer.to(self.accelerator.device)

    def _partition(self) -> None:
        """Give each process its slices of the weights, a layer at a time: rank 0's, where they have values yet.

        DeepSpeed would put the whole model on every device first.
        """
        import deepspeed

        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        device, dtype = self.accelerator.device, compute_dtype(self.accelerator)
        for module in self.module.modules():
            own = nn.ParameterList(module.parameters(recurse=False))
            allocate(own, device, dtype)
            for param in own:
                if not hasattr(param, "ds_id"):  # a tied one is partitioned already
                    param.data = param.data.to(device, dtype)
            if own:
                deepspeed.zero.Init(module=own, config_dict_or_path=config, dtype=dtype)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context for forward and `backward` of a micro-batch, which may be the `last` of the update."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss; shares sum over micro-batches and processes."""
        # DeepSpeed skips an update whose gradients are not finite, and does not look at the loss: a loss that is not
        # finite must not have finite gradients.
        finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.model.backward(loss * (self.accelerator.num_processes * finite), scale_wrt_gas=False)

    def _apply(self, loss: Tensor) -> Tensor:
        """Have DeepSpeed clip the gradients, to the norm in its configuration, and apply them.

        It may apply an update whose loss is not finite.
        """
        outcome = self._outcome(loss, torch.zeros_like(loss))
        with _scale_updated_last(self.model.optimizer):
            self.model.step()
        norm = float(self.model.get_global_grad_norm() or 0.0)
        outcome[1] = norm if norm >= 0 else math.nan  # DeepSpeed says -1
        # A non-finite update that DeepSpeed applies also counts as skipped, so that max_skipped_steps ends the run.
        outcome[2] = bool(getattr(self.model.optimizer, "overflow", False)) or not outcome[:2].isfinite().all()
        return outcome

    @property
    def scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None without one."""
        scaler = getattr(self.model.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None


@contextmanager
def _scale_updated_last(optimizer: Any) -> Iterator[None]:
    """Have DeepSpeed update its loss scale after a step made in this context.

    It does so in the step, before it divides gradients by the scale: where the scale doubles, the gradients are half.
    """
    overflows: list[bool] = []
    optimizer._update_scale = overflows.append
    try:
        yield
    finally:
        del optimizer._update_scale  # the class's own again
    for overflow in overflows:  # none, where the optimizer has no scale
        optimizer._update_scale(overflow)


def _cast_inputs(dtype: torch.dtype | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return a module's arguments with floating-point tensors in another dtype."""
    return recursively_apply(lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
