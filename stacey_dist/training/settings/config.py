"""The settings that both launchers share, with their meaning, defaults and checks.

`llm_config.py` and `image_config.py` have the settings of only one launcher, and the defaults that differ.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from stacey_dist.errors import SettingsError
from stacey_dist.extras import install_line, is_installed
from stacey_dist.training.settings import optimizer_defaults
from stacey_dist.training.settings.value_types import (
    Fraction,
    FractionBelowOne,
    NonEmptyPath,
    NonNegativeFloat,
    NormOrder,
    PositiveFloat,
    PositiveInt,
    Seed,
    UpdatesOrFraction,
    check,
    check_values,
)

Checkpointing = bool | Literal["selective"]
"""Which activations are recomputed in the backward pass: none, those of cheap operations, or all of a layer."""
# The default depends on the optimizer. Such a setting has a value in `optimizer_defaults.TEXT` for each optimizer that
# reads it, and in `_UNREAD` unless "stacey p2" reads it.
_PER_OPTIMIZER: Any = None


@dataclass
class OptimizerConfig:
    """The optimizer and its hyperparameters. Settings that are not given take the chosen optimizer's defaults. If a
    later file or option chooses another optimizer, settings that equal the previous optimizer's defaults count as not
    given."""

    name: Literal["stacey", "lp_descent", "adamw", "adam", "lion", "sgd", "muon", "ademamix"] = "stacey"
    """The optimizer. muon updates the matrices of hidden layers, and AdamW the other parameters."""
    lr: NonNegativeFloat = _PER_OPTIMIZER
    """The peak learning rate (eta in the paper)."""
    weight_decay: NonNegativeFloat = _PER_OPTIMIZER
    """Decoupled weight decay, multiplied by the scheduled lr. adam and sgd add it to the gradient instead."""
    decay_norms_and_biases: bool = False
    """Apply weight decay to one-dimensional parameters (norms, biases) too."""
    variant: Literal["p2", "pp", "2p"] = "p2"
    """stacey: the update rule, (p,2), (p,p) or (2,p). Each has its own defaults."""
    p: NormOrder = _PER_OPTIMIZER
    """stacey, lp_descent: p of the l_p norm, >= 2. At most 1000 for pp and 2p; p2 and lp_descent allow inf."""
    alpha: NonNegativeFloat = _PER_OPTIMIZER
    """stacey: the dual step size; choose it for p. ademamix: the weight of the slow average at the end of the run."""
    tau: Fraction = _PER_OPTIMIZER
    """stacey: the weight of z in the coupling; choose it for p. 0 turns the acceleration off."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = _PER_OPTIMIZER
    """stacey, lion: interpolation for the step, decay of the momentum. adamw, adam, muon, ademamix: decay of the first
    and second moments."""
    beta3: FractionBelowOne | None = None
    """ademamix: the decay of the slow average at the end of the run. It grows from the first of betas."""
    eps: NonNegativeFloat = 1e-8
    """stacey, lp_descent, adamw, adam, muon, ademamix: added to the denominator."""
    momentum: FractionBelowOne = _PER_OPTIMIZER
    """sgd, muon: the Nesterov momentum. sgd with 0 is plain SGD."""
    adamw_lr: NonNegativeFloat | None = None
    """muon: the peak learning rate of its AdamW."""
    z_init: Literal["params", "zeros"] = "params"
    """stacey: the initial value of z, the parameters or zeros."""
    state_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """stacey: the dtype of z and m."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """stacey, lp_descent: how bfloat16 states and weights are rounded."""
    bias_correction: bool = False
    """stacey: correct the bias of m toward its start at 0, as Adam does. The paper does not."""

    defaults: ClassVar[optimizer_defaults.Defaults] = optimizer_defaults.TEXT
    """The numbers of each optimizer."""
    chosen: ClassVar[tuple[str, ...]] = optimizer_defaults.NAMES
    """The settings that are the chosen optimizer's own where they are not given."""

    def __post_init__(self) -> None:
        """Fill in the numbers that were not given."""
        for name, value in optimizer_defaults.completed(self.defaults, self.method).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def method(self) -> str:
        """The optimizer, for stacey with its variant: what its default numbers are found by."""
        return optimizer_defaults.method(self.name, self.variant)

    def origins(self) -> dict[str, str]:
        """Return remarks on numbers that were not given: "default of adamw", or that adamw does not read them."""
        own = self.defaults.get(self.method, {})
        remarks = {}
        for name in self.chosen:
            if name not in own:
                remarks[name] = f"{self.method} does not read it"
            elif getattr(self, name) == own[name]:
                remarks[name] = f"default of {self.method}"
        return remarks


@dataclass
class ScheduleConfig:
    """The schedule of the learning rate, counted in updates."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """The shape after the warm-up. cosine and linear decay to the end, wsd over the last decay_steps, constant
    never."""
    warmup_steps: UpdatesOrFraction | None = None
    """Updates of linear warm-up, or a fraction of the run. null: 20, or a tenth of a run of less than 200."""
    decay_steps: UpdatesOrFraction = 0.2
    """wsd: updates of the decay, or a fraction of the run. The checkpoint before the decay is kept, to train longer."""
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    """wsd: the shape of the decay, 1 - t or 1 - sqrt(t), where t goes from 0 to 1."""
    min_lr_ratio: Fraction = 0.1
    """The learning rate at the end of the decay, as a fraction of the peak."""
    alpha: Literal["constant", "lr"] = "constant"
    """stacey: constant keeps alpha, as in the paper. lr scales alpha in proportion to the learning rate."""
    tau: Literal["constant", "lr"] = "constant"
    """stacey: constant keeps tau, as in the paper. lr scales tau in proportion to the learning rate."""
    final_p: NormOrder | None = None
    """stacey, lp_descent: p at the end of the run; 1/(p - 1) changes linearly. null: p is constant, as in the paper."""
    final_alpha: PositiveFloat | None = None
    """stacey: alpha at the end of the run; it changes by the same factor in each update. null: it is constant, as in
    the paper."""

    def warmup_updates(self, max_steps: int) -> int:
        """Return the updates of the warm-up in a run of `max_steps`."""
        return min(20, max_steps // 10) if self.warmup_steps is None else _updates(self.warmup_steps, max_steps)

    def decay_updates(self, max_steps: int) -> int:
        """Return the updates of wsd's decay in a run of `max_steps`; 0 for another schedule."""
        return _updates(self.decay_steps, max_steps) if self.name == "wsd" else 0


def _updates(setting: float, max_steps: int) -> int:
    return round(setting * max_steps) if setting < 1 else int(setting)


@dataclass
class TrainConfig:
    """Length, batches, precision, logging and evaluation."""

    max_steps: PositiveInt = 600
    """Updates in the whole run."""
    epochs: PositiveFloat | None = None
    """Passes over the training data. It determines max_steps, unless a later file or option has max_steps."""
    global_batch_size: PositiveInt = 16
    """Samples (sequences or images) per update, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Samples per forward pass on one process. It determines gradient accumulation. null: no accumulation."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 is off."""
    log_every_steps: PositiveInt = 10
    """Updates between progress lines and rows of metrics.jsonl."""
    eval_every_steps: PositiveInt = 150
    """Updates between evaluations. The run always evaluates at the end."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of forward and backward passes. fp16 uses loss scaling. null: that of `accelerate launch`."""
    gradient_checkpointing: Checkpointing = False
    """Compute activations again in the backward pass instead of keeping them; selective keeps the results of matrix
    products and attention, which cost most of the time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cpu_threads: PositiveInt | None = None
    """CPU threads per process. null: OMP_NUM_THREADS, or else the machine's cores divided by its processes."""
    max_skipped_steps: PositiveInt = 20
    """Consecutive updates that may be skipped for a non-finite loss or gradient. If more are, the run stops."""
    heartbeat_timeout_seconds: PositiveFloat | None = 120.0
    """Seconds without a heartbeat after which a process counts as dead: the others name it and stop. null: off."""
    collective_timeout_seconds: PositiveFloat = 600.0
    """Timeout of collectives, in seconds."""
    profile: tuple[PositiveInt, PositiveInt] | None = None
    """First and last update to profile on rank 0, as in '[20, 24]'; written to run_dir/profile. null: none."""


@dataclass
class CheckpointConfig:
    """When to save, which checkpoints to keep, and whether to resume."""

    every_steps: PositiveInt | None = 150
    """Updates between checkpoints. The run always saves at the end, and on SIGTERM or Ctrl-C. null: off."""
    every_minutes: PositiveFloat | None = 30.0
    """Longest time between checkpoints, in minutes, in addition to every_steps. null: off."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = False
    """Save after each evaluation that is the best yet, and keep the best checkpoint."""
    keep_every: PositiveInt | None = None
    """Also keep, permanently, each checkpoint whose number of updates is a multiple of this."""
    asynchronous: bool = True
    """Write in the background: training waits only for the copy to host memory. The run waits for the last
    checkpoint."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest complete checkpoint in run_dir. never: if run_dir has one, stop with an error."""
    resume_from: str | None = None
    """A checkpoint, of any run, to start from if run_dir has none. Later starts resume from run_dir."""
    allow_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's, as in '[train.global_batch_size, data]'."""


@dataclass
class TrackingConfig:
    """Experiment trackers, through Accelerate, and what else to record."""

    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Trackers to log to, as in '[wandb, tensorboard]'. wandb is offline unless you are logged in."""
    project: str = "stacey_dist"
    """The project's name in the tracker."""
    run_name: str | None = None
    """The run's name in the tracker. null: the name of run_dir."""
    histogram_every: PositiveInt | None = None
    """Updates between rows of norms.jsonl: each layer's norms of weights, gradients and states. null: none."""


@dataclass
class HubConfig:
    """Upload of the exported model to the Hugging Face hub."""

    push_to: str | None = None
    """Model repository to upload to when the run is complete, as in name/model. It is created if it does not exist."""
    private: bool = False
    """Create a new repository as private."""


DATA_CHANGE = "data"
SHARED_CHANGES = ("seed", DATA_CHANGE, "train.global_batch_size", "optimizer.variant")
"""The `changes_to_allow` of every program."""


@dataclass
class RunConfig:
    """The settings of a run of either launcher; a subclass adds those of its model and its data."""

    run_dir: NonEmptyPath = "runs/default"
    """Directory of the run: configuration, metrics, plots, checkpoints and the exported model."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the data and stochastic rounding."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    instead_of: ClassVar[Mapping[str, str]] = {"train.max_steps": "train.epochs"}
    """A setting, and the one that becomes null where a later file or option has it."""
    samples: ClassVar[str] = "samples"
    """The name of samples, as in "sequences"."""
    changes_to_allow: ClassVar[tuple[str, ...]] = SHARED_CHANGES
    """Settings whose change makes it another run: resuming refuses it unless `checkpoint.allow_changes` names it. The
    data themselves (`DATA_CHANGE`) are compared by content: their files may have moved."""

    def validate(self) -> None:
        """Raise SettingsError for a value that is out of range, or for values that do not go together."""
        check_values(self)
        self.check_rules()

    def check_rules(self) -> None:
        """Raise SettingsError for values that do not go together. A subclass adds its own rules."""
        _check_optimizer(self)
        _check_checkpoint(self.checkpoint, self.changes_to_allow)
        _check_hub(self.hub)
        for tracker in self.tracking.trackers:
            missing = f"{tracker} is not installed; {install_line(tracker)}"
            check(is_installed(tracker), "tracking.trackers", tracker, missing)
        first, last = self.train.profile or (1, 1)
        self.require(first <= last, "train.profile", "its first update must not be after its last one")
        if self.train.epochs is None:
            check_schedule(self)
        split_batch(self.train, processes=1)

    def require(self, condition: bool, setting: str, allowed: str) -> None:
        """Raise SettingsError naming a setting, its value and what is allowed, unless `condition` holds."""
        value = functools.reduce(getattr, setting.split("."), self)
        check(condition, setting, list(value) if isinstance(value, tuple) else value, allowed)

    @property
    def weights_dtype(self) -> str:
        """The dtype of the weights before the engine casts them."""
        return "float32"

    def layer_classes(self) -> set[str] | None:
        """Return the names of the model's classes; None if they are not known before it is built."""
        return None


def data_directory(run_dir: str) -> Path:
    """Return where a run keeps prepared data if `data.cache_dir` is null."""
    return Path(run_dir) / "data"


def split_batch(train: TrainConfig, processes: int) -> tuple[int, int]:
    """Return the samples of an update and of a micro-batch on each of so many processes.

    Raises SettingsError if the global batch does not divide over the processes, or their shares over micro-batches.
    """
    batch = train.global_batch_size
    allowed = f"it must be a multiple of the number of processes, {processes}"
    check(batch % processes == 0, "train.global_batch_size", batch, allowed)
    share = batch // processes
    micro_batch = train.micro_batch_size or share
    allowed = f"it must divide train.global_batch_size / processes = {share}"
    check(share % micro_batch == 0, "train.micro_batch_size", micro_batch, allowed)
    return share, micro_batch


def check_schedule(config: RunConfig) -> None:
    """Raise SettingsError if the run is over before the warm-up is, or before wsd's decay begins."""
    schedule, last = config.schedule, config.train.max_steps
    warmup = schedule.warmup_updates(last)
    allowed = f"it must be at most train.max_steps = {last}"
    config.require(warmup <= last, "schedule.warmup_steps", allowed)
    allowed = f"it must be at most {last - warmup}, train.max_steps without the warm-up"
    config.require(schedule.decay_updates(last) <= last - warmup, "schedule.decay_steps", allowed)


def _check_optimizer(config: RunConfig) -> None:
    optimizer = config.optimizer
    if config.schedule.final_alpha is not None and optimizer.name == "stacey":
        config.require(optimizer.alpha > 0, "optimizer.alpha", "it must be > 0 with schedule.final_alpha")
        config.require(
            config.schedule.alpha == "constant", "schedule.alpha", "it must be constant with schedule.final_alpha"
        )
    config.require(optimizer.lr > 0 or optimizer.name != "lion", "optimizer.lr", "lion needs it > 0")
    if optimizer.name == "ademamix":
        missing = f"pytorch_optimizer is not installed; {install_line('pytorch_optimizer')}"
        config.require(is_installed("pytorch_optimizer"), "optimizer.name", missing)
        config.require(optimizer.betas[0] > 0, "optimizer.betas", "ademamix needs the first > 0")
    if optimizer.name != "stacey" or optimizer.variant == "p2":
        return
    for_variant = f"for optimizer.variant = {optimizer.variant}"
    for setting, p in (("optimizer.p", optimizer.p), ("schedule.final_p", config.schedule.final_p or 2.0)):
        config.require(p < math.inf, setting, f"it must be finite {for_variant}")
        config.require(p <= 1000, setting, f"it must be at most 1000 {for_variant}")


def _check_hub(hub: HubConfig) -> None:
    if hub.push_to is None:
        return
    missing = f"huggingface_hub is not installed; {install_line('transformers')}"
    check(is_installed("huggingface_hub"), "hub.push_to", hub.push_to, missing)
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(hub.push_to)
    except HFValidationError as error:
        allowed = "it must be the name of a model repository, as in name/model"
        raise SettingsError(f"hub.push_to: {hub.push_to} is not allowed; {allowed}") from error


def _check_checkpoint(checkpoint: CheckpointConfig, changes_to_allow: tuple[str, ...]) -> None:
    for name in checkpoint.allow_changes:
        check(name in changes_to_allow, "checkpoint.allow_changes", name, f"it may name {', '.join(changes_to_allow)}")
    source = checkpoint.resume_from
    allowed = f"it must be auto with checkpoint.resume_from = {source}, from which an interrupted run resumes too"
    check(source is None or checkpoint.resume != "never", "checkpoint.resume", checkpoint.resume, allowed)
