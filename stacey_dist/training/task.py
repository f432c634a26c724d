"""`Task`, the interface to the data and loss that the loop trains on, and `DatasetTask`, for a data set of samples."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate

from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.training.ahead import Ahead
from stacey_dist.training.run import Run


class Task(Protocol):
    """The data of each update, its loss, and how to judge the result. What a subclass may leave out has a default.

    The data of an update are a function of its position, which counts the samples of all updates before it. So a run
    resumes from one number, on any number of processes.
    """

    unit: str = "samples"
    """The unit in which data is counted, in the plural, as in "tokens"."""

    loss_label: str = "loss"
    """The name of the loss in plots."""

    flops_per_unit: float = 0.0
    """Floating-point operations of forward and backward on one unit, for the share of the device's peak speed; 0 where
    that is not to be reported."""

    data_identity: str
    """A text that differs if the data differ: a run does not resume on data with another one."""

    batch_size: int
    """Samples of one update, over all processes."""

    samples_per_epoch: int
    """Samples of the training data."""

    def micro_batches(self, position: int) -> Iterable[Any]:
        """Return this process's micro-batches of the update at this position, on its device.

        There are `run.process_batch_size / run.micro_batch_size` of them. Each is passed to `loss` as it is.
        """
        ...

    def units(self, position: int) -> int:
        """Return how many units all processes together train on in the update at this position."""
        return self.batch_size

    def units_before(self, position: int) -> int:
        """Return the units of all updates before a position; to be overridden where updates differ in units."""
        return position * self.units(0) // self.batch_size

    def epochs(self, position: int) -> dict[str, float]:
        """Return the passes up to a position over each part of data with epochs of its own: {"epoch_of.web": 0.4}."""
        return {}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the micro-batch's share of the update's loss, a scalar.

        It is the summed loss of the micro-batch, divided by the number of samples (or tokens) in the whole update, over
        all micro-batches and processes. The mean of the micro-batch is too large: nothing divides it later.
        """
        ...

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return held-out figures, the same on every process, under names that begin with "eval_".

        Args:
            model: the model in evaluation mode; gradients are off.
            stopping: to be called after each batch, the same number of times on every process. Where it returns true,
                return None.
        """
        ...

    def score(self, figures: dict[str, float]) -> float:
        """Return how good the figures of an evaluation are: higher is better."""
        return -figures["eval_loss"]

    def close(self) -> None:
        """End what the task has started, as processes that read data. Called after the last update."""


class DatasetTask(Task):
    """Training on a data set of samples; a subclass says what their `losses` are.

    Each epoch has its own order, a function of the seed. A thread reads the next update's samples while the device
    works on this one.

    Args:
        run: the run.
        data: the training samples and the held-out samples, both with `len` and numbered from 0; a sample is a tensor,
            a number, or a tuple or dictionary of them. A number must always give the same sample, or resumed runs
            differ: random changes belong into `losses`, whose generators the loop seeds for each update.
        model: the model.

    Raises:
        ValueError: one of the two sets is empty.
    """

    def __init__(self, run: Run[Any], data: tuple[Sequence[Any], Sequence[Any]], model: nn.Module) -> None:
        self.run, (self.train_set, self.held_out_set) = run, data
        if not len(self.train_set) or not len(self.held_out_set):
            raise ValueError(f"{type(self).__name__}: neither the training nor the held-out samples may be empty")
        self.batch_size = run.config.train.global_batch_size
        self.samples_per_epoch = len(self.train_set)
        # Two sets of as many samples count as the same; a subclass that can tell them apart sets another.
        self.data_identity = f"{len(self.train_set)} training and {len(self.held_out_set)} held-out samples"
        self._sampler = GlobalSampler(len(self.train_set), run.config.seed)
        self._ahead = Ahead(self._read_share, self.batch_size)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of each sample of a batch, of shape (samples,). A subclass says what it is.

        Args:
            model: the model.
            batch: samples as `torch.utils.data.default_collate` joins them, on the model's device.
        """
        raise NotImplementedError

    def micro_batches(self, position: int) -> Iterator[Any]:
        """Yield this process's share of the update's samples, in order."""
        for batch in self._ahead.take(position):
            yield self._on_device(batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the micro-batch's summed losses over the number of samples in the whole update."""
        losses = self.losses(model, batch)
        if losses.shape != (self.run.micro_batch_size,):
            raise ValueError(
                f"{type(self).__name__}.losses returned a tensor of shape {tuple(losses.shape)}; it must be "
                f"({self.run.micro_batch_size},), a loss for each sample"
            )
        return losses.sum() / self.batch_size

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return the mean loss of the held-out samples, each counted once."""
        accelerator, count, size = self.run.accelerator, len(self.held_out_set), self.run.micro_batch_size
        mine = range(accelerator.process_index, count, accelerator.num_processes)
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        # As many forward passes on every process: sharded engines gather weights in each of them.
        for start in range(0, math.ceil(count / accelerator.num_processes), size):
            samples = mine[start : start + size]
            losses = self.losses(model, self._on_device(self._read(self.held_out_set, samples or [0])))
            total += losses.sum() if samples else 0.0
            if stopping():
                return None
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(total)
        return {"eval_loss": float(total) / count}

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._ahead.close()

    def _read_share(self, position: int) -> list[Any]:
        """Return the micro-batches of this process in the update at `position`, in host memory."""
        share, size = self.run.process_batch_size, self.run.micro_batch_size
        mine = self._sampler.samples(position + self.run.accelerator.process_index * share, share).tolist()
        return [self._read(self.train_set, mine[start : start + size]) for start in range(0, share, size)]

    def _read(self, samples: Sequence[Any], numbers: Iterable[int]) -> Any:
        return default_collate([samples[number] for number in numbers])

    def _on_device(self, batch: Any) -> Any:
        return send_to_device(batch, self.run.accelerator.device, non_blocking=True)
