"""Make one update on the engine that `accelerate launch` was configured with.

The training loop is the same for all engines: backward of each micro-batch, then `finish_update`.

    engine           gradients are reduced                 clipped by    Stacey.step is called by, on
    single, ddp      by DDP, in the last micro-batch       Stacey (*)    finish_update, whole parameters
    zero_redundancy  by DDP, in the last micro-batch       Stacey (*)    ZeroRedundancyOptimizer, the parameters that
                                                                         this rank owns, which it then broadcasts
    fsdp2            by reduce-scatter, each micro-batch   Stacey (*)    finish_update, this rank's rows of DTensors
    deepspeed        by DeepSpeed                          DeepSpeed     DeepSpeed's step, this rank's flat float32
                                                                         partitions (`sharding/deepspeed.py`)

(*) In its own pass over the gradients, by `grad_scale`. Gradients of other optimizers are clipped before the step.
"""

import gc
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer

from stacey_dist.optim import Stacey
from stacey_dist.optim.base import kernel
from stacey_dist.optim.memory import full_tensor
from stacey_dist.sharding import base_optimizer, fragments, state_bytes
from stacey_dist.sharding.fragment import canonical_name
from stacey_dist.training.batch_norms import BatchNorms
from stacey_dist.training.initial_weights import InitialWeights, allocate
from stacey_dist.training.processes import heartbeat, signals
from stacey_dist.training.processes.launch import (
    compute_dtype,
    loads_weights_from_rank0,
    requested_engine,
    shards_weights,
)
from stacey_dist.training.processes.launch_settings import configuration_errors
from stacey_dist.training.processes.requests import Agreement, Requests
from stacey_dist.training.reports.trackers import close_trackers
from stacey_dist.training.run import Run


class Engine:
    """The model and its optimizer on one process, DDP, ZeroRedundancyOptimizer or FSDP2.

    An update in a loop of your own::

        engine.begin_update({"lr": lr})
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches):
            with engine.micro_batch(last=number == len(batches) - 1):
                loss = share_of_loss(engine.model, batch)  # divided by the samples of the whole update
                engine.backward(loss)
            total += loss.detach()
        loss, grad_norm, skipped = engine.finish_update(total)

    Args:
        run: the run.
        model: the model, not yet moved to a device or sharded.
        optimizer: its optimizer, without state.

    Attributes:
        module: the model as it was built.
        model: what the engine made of it, such as DDP's wrapper; call this one to train.
        optimizer: what Accelerate made of the optimizer; `sharding.base_optimizer` returns the innermost.

    Raises:
        SettingsError: the engine cannot do what the settings ask for.
    """

    def __init__(self, run: Run[Any], model: nn.Module, optimizer: Optimizer) -> None:
        self.run, self.module = run, model
        self.accelerator = run.accelerator
        self.name = requested_engine()
        self.agreement = Agreement(self.accelerator.num_processes, run.config.train.collective_timeout_seconds)
        self._prepare(optimizer)
        self._batch_norms = BatchNorms(model)  # now: `prepare` may replace buffers when it moves the model
        fragments(self.model, self.optimizer, self.accelerator)  # raises if the model is not sharded as launched
        if isinstance(initial := getattr(model, "initial_weights", None), InitialWeights):
            initial.fill(self.model, self.optimizer, self.accelerator.device)
        self._make_capturable()

    def _prepare(self, optimizer: Optimizer) -> None:
        if self.name == "fsdp2":
            self._shard(optimizer)
            return
        # No device placement of the optimizer: its state is created on the parameters' device, and Accelerate would
        # call `ZeroRedundancyOptimizer.state_dict`, which raises an error.
        with configuration_errors("the configuration of `accelerate launch`"):
            self.model, self.optimizer = self.accelerator.prepare(
                self.module, optimizer, device_placement=[True, False]
            )

    def _shard(self, optimizer: Optimizer) -> None:
        """Shard the model with FSDP2. Its weights are on the meta device, on rank 0 only, or on every rank."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:  # Accelerate would have processes add gradients in bf16
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
        without_memory = any(param.is_meta for param in self.module.parameters())
        rank0_sends = not without_memory and loads_weights_from_rank0(self.accelerator, self.module)
        plugin.cpu_ram_efficient_loading = rank0_sends  # its weights, one at a time
        names = {param: canonical_name(name) for name, param in self.module.named_parameters()}
        groups = [[names[param] for param in group["params"]] for group in optimizer.param_groups]
        with configuration_errors("the configuration of `accelerate launch`"):
            self.model, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        if without_memory:
            offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
            allocate(self.module.parameters(), torch.device("cpu") if offloaded else self.accelerator.device)
            # Accelerate tells parameters by their addresses, and these had none.
            params = {canonical_name(name): param for name, param in self.module.named_parameters()}
            for group, members in zip(self.optimizer.param_groups, groups, strict=True):
                group["params"] = [params[name] for name in members]

    def broadcast_buffers(self) -> None:
        """Copy rank 0's buffers, which are those in the checkpoints, to every process: batch norms' statistics.

        Engines leave each process with those of its own share of the batches.
        """
        if self.accelerator.num_processes > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def begin_update(self, settings: dict[str, Any]) -> None:
        """Begin an update: copy the statistics of batch norms, and set the learning rate or other group settings.

        Call it before each update, also if nothing is to be set: a skipped update restores the copies.
        """
        self._batch_norms.keep()
        for group in self.optimizer.param_groups:
            for name, value in settings.items():
                if isinstance(group[name], Tensor):
                    group[name].fill_(value)
                else:
                    group[name] = value

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Return what is entered around forward and `backward` of a micro-batch, which may be the update's `last`."""
        # DDP averages gradients over processes once, with the last micro-batch. FSDP2 does it each time: it would
        # otherwise keep whole gradients.
        wait = not last and self.name != "fsdp2"
        return self.accelerator.no_sync(self.model) if wait else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss; shares sum over micro-batches and processes."""
        # Engines average gradients over ranks, and shares are summed. Accelerate divides the loss by its
        # gradient_accumulation_steps, which `start_accelerator` sets to 1.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def finish_update(self, loss: Tensor) -> Tensor:
        """Clip and apply the gradients, unless they or the loss are not finite, and clear them.

        The host waits for the device only if the optimizer cannot skip an update on the device.

        Args:
            loss: this process's share of the update's loss, a scalar on its device.

        Returns:
            The outcome, on the device, float32 of shape (3,), the same on all processes: the loss, the gradient norm,
            and 1 if one of them is not finite, else 0. If it is 1, the update is skipped: weights, states and the
            statistics of batch norms do not change.
        """
        outcome = self._apply(loss)
        self._batch_norms.restore(outcome[2])
        return outcome

    def cancel_update(self) -> None:
        """Undo the micro-batches of an update: restore the statistics of batch norms, and clear the gradients."""
        self.optimizer.zero_grad()
        self._batch_norms.restore(torch.ones((), device=self.accelerator.device))

    def _apply(self, loss: Tensor) -> Tensor:
        """Do what `finish_update` does, but for batch norms."""
        self.accelerator.unscale_gradients()  # this also records overflows for `scaler.update`
        base, limit = base_optimizer(self.optimizer), self.run.config.train.max_grad_norm
        gradients = [param.grad for param in self.model.parameters() if param.grad is not None]
        outcome = self._outcome(loss, full_tensor(nn.utils.get_total_norm(gradients)))
        _, norm, skipped = outcome
        clips_in_step = isinstance(base, Stacey)  # no pass over the gradients of its own
        if limit > 0 and not clips_in_step:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        optimizer: Any = self.optimizer.optimizer  # Accelerate's own step waits, to know whether it skips
        if clips_in_step or getattr(base, "_step_supports_amp_scaling", False):
            clips = clips_in_step and limit > 0
            divisor = torch.where(norm > limit, norm.double() / limit, 1.0).float() if clips else None
            with _set(base, grad_scale=divisor, found_inf=skipped.to(self._update_device(skipped.device))):
                optimizer.step()
        elif not skipped:  # it cannot skip an update by itself, so the host waits
            optimizer.step()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()
        return outcome

    def _make_capturable(self) -> None:
        """Have Stacey's kernel read on the GPU whether an update is skipped, and count updates there."""
        base = base_optimizer(self.optimizer)
        if isinstance(base, Stacey) and self._kernel_runs_on_gpu():
            # ZeroRedundancyOptimizer has its own copy of the groups.
            for group in (*self.optimizer.param_groups, *base.param_groups):
                group["capturable"] = True

    def _kernel_runs_on_gpu(self) -> bool:
        device = self._update_device(self.accelerator.device)
        return device.type == "cuda" and kernel("cuda") is not None

    def _update_device(self, otherwise: torch.device) -> torch.device:
        """Return where the parameters are updated: with offloading, on the CPU."""
        groups = base_optimizer(self.optimizer).param_groups
        return next((param.device for group in groups for param in group["params"]), otherwise)

    def _outcome(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return an update's outcome by one all-reduce: the summed loss, rank 0's gradient norm, whether to skip."""
        # Replicas on unlike processors may sum the norm in another order, and would drift apart.
        norm = norm if self.accelerator.is_main_process else torch.zeros_like(norm)
        shared = torch.stack([loss, norm.to(loss)])
        if self.accelerator.num_processes > 1:
            dist.all_reduce(shared)
        skipped = shared.isfinite().all().logical_not()
        return torch.cat([shared, skipped.reshape(1).to(shared)])

    def any_process(self, value: bool) -> bool:
        """Return whether `value` is true on any process. All processes call it together."""
        return self.agreement.ask(Requests(stop=value))().stop

    def state_report(self) -> str:
        """Return how much optimizer state a process holds, as a line to print. All processes call it together."""
        parts = fragments(self.model, self.optimizer)
        mine = [state_bytes(self.optimizer), sum(f.stop - f.start for f in parts if f.replica == 0)]
        figures = torch.tensor(mine, dtype=torch.int64, device=self.accelerator.device)
        everyone = self.accelerator.gather(figures).view(-1, 2)
        most, parameters = int(everyone[:, 0].max()), int(everyone[:, 1].sum())
        return f"optimizer state: {most / 2**20:,.1f} MiB a process, {most / parameters:.2f} bytes a parameter"

    def close(self) -> None:
        """Close the trackers, free the model and the optimizer, and leave the other processes.

        The launcher stops all processes when one has left, so all wait for the trackers of the main process. A DDP
        wrapper that is freed after the process group waits for gloo's thread, with the interpreter locked, while that
        thread may wait for the interpreter.
        """
        with signals.writing():
            self.run.call_on_main(partial(close_trackers, self.run))
        heartbeat.stop()
        del self.model, self.optimizer
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()

    @property
    def scaler(self) -> Any:
        """The dynamic loss scaler, torch's or DeepSpeed's; None without one. See `loss_scale`."""
        return self.accelerator.scaler


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
        """Return what is entered around forward and `backward` of a micro-batch, which may be the update's `last`."""
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
    update_scale = getattr(optimizer, "_update_scale", None)
    if update_scale is None:
        yield
        return
    overflows: list[bool] = []
    optimizer._update_scale = overflows.append
    try:
        yield
    finally:
        del optimizer._update_scale  # the class's own again
    for overflow in overflows:
        update_scale(overflow)


def _cast_inputs(dtype: torch.dtype | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return a module's arguments with floating-point tensors in another dtype."""
    return recursively_apply(lambda tensor: tensor.to(dtype), (args, kwargs), test_type=_is_floating_point)


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _set(optimizer: Optimizer, **values: Tensor | None) -> Iterator[None]:
    """Set attributes that torch's fused optimizers and `Stacey` read in a step, as `torch.amp.GradScaler` does."""
    vars(optimizer).update(values)
    try:
        yield
    finally:
        for name in values:
            delattr(optimizer, name)


def build_engine(run: Run[Any], model: nn.Module, optimizer: Optimizer) -> Engine:
    """Return the engine that the launch asked for, with the model and its optimizer on it."""
    return (DeepSpeedEngine if requested_engine() == "deepspeed" else Engine)(run, model, optimizer)
