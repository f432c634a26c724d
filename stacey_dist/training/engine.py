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
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from stacey_dist.optim import Stacey
from stacey_dist.optim.base import kernel
from stacey_dist.optim.memory import full_tensor
from stacey_dist.sharding import base_optimizer, fragments, state_bytes
from stacey_dist.training import fsdp2
from stacey_dist.training.batch_norms import BatchNorms
from stacey_dist.training.initial_weights import InitialWeights
from stacey_dist.training.processes import heartbeat, signals
from stacey_dist.training.processes.launch import requested_engine
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
            self.model, self.optimizer = fsdp2.shard(self.accelerator, self.module, optimizer)
            return
        # No device placement of the optimizer: its state is created on the parameters' device, and Accelerate would
        # call `ZeroRedundancyOptimizer.state_dict`, which raises an error.
        with configuration_errors("the configuration of `accelerate launch`"):
            self.model, self.optimizer = self.accelerator.prepare(
                self.module, optimizer, device_placement=[True, False]
            )

    def broadcast_buffers(self) -> None:
        """Copy rank 0's buffers, which are those in the checkpoints, to every process: batch norms' statistics.

        Engines leave each process with those of its own share of the batches.
        """
        if self.accelerator.num_processes > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)

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
        """Return the context for forward and `backward` of a micro-batch, which may be the `last` of the update."""
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
        """Clip and apply the gradients, and return the outcome. `finish_update` restores batch norms' statistics."""
        self.accelerator.unscale_gradients()  # this also records overflows for `scaler.update`
        base: Any = base_optimizer(self.optimizer)
        limit = self.run.config.train.max_grad_norm
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
            # As `torch.amp.GradScaler` does for torch's fused optimizers; `Stacey` reads the same attributes.
            base.grad_scale, base.found_inf = divisor, skipped.to(self._update_device(skipped.device))
            try:
                optimizer.step()
            finally:
                del base.grad_scale, base.found_inf
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


def build_engine(run: Run[Any], model: nn.Module, optimizer: Optimizer) -> Engine:
    """Return the engine that the launch asked for, with the model and its optimizer on it."""
    if requested_engine() == "deepspeed":
        from stacey_dist.training.deepspeed_engine import DeepSpeedEngine  # a subclass of `Engine`

        return DeepSpeedEngine(run, model, optimizer)
    return Engine(run, model, optimizer)
