"""Every setting of the launchers, with its meaning, its default and its check.

The defaults are the quickstart: `train_llm.py` without arguments. The sections that both launchers share come
first.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from stacey_dist.errors import SettingsError


@dataclass
class OptimizerConfig:
    """Which optimizer, and its numbers."""

    name: Literal["stacey", "lp_descent", "adamw", "adam", "lion", "sgd"] = "stacey"
    """The optimizer. sgd is SGD with Nesterov momentum."""
    lr: float = 0.003
    """The peak learning rate (eta in the paper)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the scheduled lr; adam and sgd add it to the gradient instead."""
    decay_norms_and_biases: bool = False
    """Decay one-dimensional parameters (norms, biases) too."""
    variant: Literal["p2", "pp", "2p"] = "p2"
    """stacey: the rule, (p,2), (p,p) or (2,p)."""
    p: float = 30.0
    """stacey, lp_descent: the norm, >= 2. inf is allowed for p2 and lp_descent."""
    alpha: float = 1.0
    """stacey: the dual step size, not scheduled. alpha and tau belong to p: the defaults suit p = 30, not p near 3."""
    tau: float = 0.03
    """stacey: the weight of z in the coupling; 0 switches the acceleration off."""
    betas: tuple[float, float] = (0.9, 0.99)
    """stacey, adamw, adam, lion: interpolation or first-moment decay, and momentum or second-moment decay."""
    eps: float = 1e-8
    """stacey, lp_descent, adamw, adam: added to the denominator."""
    momentum: float = 0.9
    """sgd: the momentum; 0 is plain SGD."""
    z_init: Literal["params", "zeros"] = "params"
    """stacey: where z starts."""
    state_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """stacey: the dtype of z and m."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """stacey: how bfloat16 states and weights are rounded."""


@dataclass
class ScheduleConfig:
    """The learning rate over the run, counted in updates."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """The shape of the decay after the warm-up."""
    warmup_steps: int = 20
    """Updates of linear warm-up; the first update already has lr / warmup_steps."""
    min_lr_ratio: float = 0.1
    """The floor of the decay, as a share of the peak."""


@dataclass
class TrainConfig:
    """How long, in what batches, and how often to look."""

    max_steps: int = 600
    """Updates of the whole run."""
    global_batch_size: int = 16
    """Sequences of one update, over all processes."""
    micro_batch_size: int | None = None
    """Sequences of one forward pass on one process; the accumulation follows. None: no accumulation."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 is off."""
    log_every_steps: int = 10
    """Updates between progress lines and rows of metrics.jsonl."""
    eval_every_steps: int = 150
    """Updates between evaluations; there is always one at the end."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of forward and backward; fp16 with loss scaling. None: as `accelerate launch` was told."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cpu_threads: int | None = None
    """Threads of a process that trains on the CPU. None: the machine's cores, shared by the processes on it."""
    max_skipped_steps: int = 20
    """Updates skipped in a row, for a loss or gradient that is not finite, after which the run stops."""
    heartbeat_timeout_seconds: float | None = 120.0
    """Seconds of silence after which a process counts as dead, and the others name it and stop. null: off."""
    collective_timeout_seconds: float = 600.0
    """Seconds that processes wait for each other in a collective before they give up."""


@dataclass
class CheckpointConfig:
    """When to save, what to keep, whether to go on."""

    every_steps: int | None = 150
    """Updates between checkpoints; there is always one at the end and on SIGTERM or Ctrl-C."""
    every_minutes: float | None = 30.0
    """Minutes after which there is another checkpoint, whatever every_steps says."""
    keep_last: int = 2
    """How many checkpoints are kept, the newest."""
    keep_every: int | None = None
    """Checkpoints whose number of updates is a multiple of this are kept too, for good."""
    asynchronous: bool = True
    """Write beside training, which waits for a copy in host memory only; the last checkpoint is always waited for."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest complete checkpoint in run_dir; never refuses a run_dir that has one."""
    resume_from: str | None = None
    """A checkpoint, of any run, to begin from while run_dir has none that came from it."""
    allow_changes: list[str] = field(default_factory=list)
    """Changes since the checkpoint that are wanted, as in '[train.global_batch_size, data]'."""


@dataclass
class TrackingConfig:
    """Experiment trackers, through Accelerate."""

    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Trackers to log to, as in '[wandb, tensorboard]'. wandb is offline unless you are logged in."""
    project: str = "stacey_dist"
    """The project's name in the tracker."""
    run_name: str | None = None
    """The run's name in the tracker. None: the name of run_dir."""


@dataclass
class ModelConfig:
    """The LLaMA to build (transformers' LlamaForCausalLM)."""

    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 344
    """Width inside each feed-forward block."""
    num_hidden_layers: int = 4
    """Number of layers."""
    num_attention_heads: int = 4
    """Number of attention heads."""
    num_key_value_heads: int | None = None
    """Number of key-value heads. None: one for each attention head."""
    max_position_embeddings: int | None = None
    """Longest sequence the model is declared for. None: data.sequence_length."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """Share the input and output embeddings."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights. bfloat16 has no float32 master: for stacey and lp_descent, which round stochastically."""


@dataclass
class DataConfig:
    """What to train on. Without files or dataset: the documentation of Python's standard library."""

    files: list[str] = field(default_factory=list)
    """Files or patterns: JSON lines (.json, .jsonl, also .gz) as C4 has them, .parquet, .txt."""
    validation_files: list[str] = field(default_factory=list)
    """Files or patterns to evaluate on. Empty: documents held out of the training data."""
    dataset: str | None = None
    """A dataset on the Hugging Face hub, as in allenai/c4."""
    dataset_config: str | None = None
    """The dataset's configuration, as in en."""
    dataset_split: str = "train"
    """The split to train on."""
    dataset_validation_split: str | None = "validation"
    """The split to evaluate on. null: documents held out of the training data."""
    streaming: bool = True
    """Read the hub's dataset while it arrives, instead of downloading all of it first."""
    text_column: str = "text"
    """The column or key that holds a document's text."""
    sequence_length: int = 128
    """Tokens of one training sequence."""
    max_tokens: int | None = None
    """Training tokens to prepare at most. None: all."""
    validation_every: int = 50
    """Without a validation set, one document in this many is held out."""
    cache_dir: str | None = None
    """Where tokenized data is kept, for all runs. None: run_dir/data."""


@dataclass
class TokenizerConfig:
    """The tokenizer: a sentencepiece model, a hub tokenizer, or one trained on the data."""

    name: str | None = None
    """A tokenizer on the Hugging Face hub, or a directory that AutoTokenizer loads."""
    file: str | None = None
    """A sentencepiece .model file."""
    vocab_size: int = 2048
    """Without name and file, a sentencepiece BPE model of this size is trained on the data."""


@dataclass
class LLMConfig:
    """Pretrain a LLaMA with STACEY."""

    run_dir: str = "runs/quickstart"
    """Directory of the run: configuration, metrics, plots, checkpoints, the exported model."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and stochastic rounding."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


DATA_CHANGE = "data"
# What makes it another run, and is refused on resuming unless allowed. The data themselves, and the tokenizer, are
# compared by content: their files may have moved.
CHANGES_TO_ALLOW = (
    "seed",
    *(f"model.{name.name}" for name in fields(ModelConfig) if name.name != "max_position_embeddings"),
    DATA_CHANGE,
    "data.sequence_length",
    "train.global_batch_size",
    "optimizer.variant",
)


def validate(config: LLMConfig) -> None:
    """Raise SettingsError for a value that is out of range, whatever it is combined with."""
    positive = {
        "model": (
            "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "max_position_embeddings rope_theta initializer_range"
        ),
        "data": "sequence_length max_tokens",
        "tokenizer": "vocab_size",
        "train": (
            "max_steps global_batch_size micro_batch_size log_every_steps eval_every_steps cpu_threads "
            "max_skipped_steps heartbeat_timeout_seconds collective_timeout_seconds"
        ),
        "checkpoint": "every_steps every_minutes keep_last keep_every",
    }
    for section, names in positive.items():
        for name in names.split():
            value = getattr(getattr(config, section), name)
            check(value is None or value > 0, f"{section}.{name}", value, "it must be > 0")
    not_negative = {
        "optimizer": "lr weight_decay eps alpha",
        "schedule": "warmup_steps min_lr_ratio",
        "train": "max_grad_norm",
    }
    for section, names in not_negative.items():
        for name in names.split():
            value = getattr(getattr(config, section), name)
            check(0 <= value < math.inf, f"{section}.{name}", value, "it must be a finite number >= 0")
    check(config.seed >= 0, "seed", config.seed, "it must be >= 0")
    check(config.run_dir.strip() != "", "run_dir", config.run_dir, "it must name a directory")
    _validate_model(config)
    _validate_optimizer(config.optimizer)
    _validate_checkpoint(config.checkpoint)
    schedule, train, data = config.schedule, config.train, config.data
    check(schedule.min_lr_ratio <= 1, "schedule.min_lr_ratio", schedule.min_lr_ratio, "it must be within [0, 1]")
    check(
        schedule.warmup_steps <= train.max_steps,
        "schedule.warmup_steps",
        schedule.warmup_steps,
        f"it must be at most train.max_steps = {train.max_steps}",
    )
    micro = train.micro_batch_size
    check(
        micro is None or train.global_batch_size % micro == 0,
        "train.micro_batch_size",
        micro,
        f"it must divide train.global_batch_size = {train.global_batch_size}",
    )
    check(data.validation_every >= 2, "data.validation_every", data.validation_every, "it must be >= 2")
    check(
        not (data.files and data.dataset),
        "data.dataset",
        data.dataset,
        "give either data.files or data.dataset, not both (--data.dataset null)",
    )
    check(
        bool(data.files) or not data.validation_files,
        "data.validation_files",
        data.validation_files,
        "it goes with data.files",
    )
    tokenizer = config.tokenizer
    check(
        not (tokenizer.name and tokenizer.file),
        "tokenizer.file",
        tokenizer.file,
        "give either tokenizer.name or tokenizer.file, not both",
    )


def _validate_model(config: LLMConfig) -> None:
    model = config.model
    heads, hidden = model.num_attention_heads, model.hidden_size
    check(
        hidden % heads == 0,
        "model.num_attention_heads",
        heads,
        f"it must divide model.hidden_size = {hidden}",
    )
    check(
        hidden // heads % 2 == 0,
        "model.num_attention_heads",
        heads,
        f"model.hidden_size / model.num_attention_heads = {hidden // heads} must be even, for rotary embeddings",
    )
    groups = model.num_key_value_heads
    check(
        groups is None or heads % groups == 0,
        "model.num_key_value_heads",
        groups,
        f"it must divide model.num_attention_heads = {heads}",
    )
    longest, length = model.max_position_embeddings, config.data.sequence_length
    check(
        longest is None or longest >= length,
        "model.max_position_embeddings",
        longest,
        f"it must be at least data.sequence_length = {length}",
    )
    name = config.optimizer.name
    check(
        model.dtype == "float32" or name in ("stacey", "lp_descent"),
        "model.dtype",
        model.dtype,
        f"optimizer.name = {name} rounds bfloat16 weights to nearest, which loses its updates; "
        "use float32 with train.mixed_precision bf16, or stacey",
    )
    check(
        model.dtype == "float32" or config.train.mixed_precision != "fp16",
        "train.mixed_precision",
        "fp16",
        f"it needs model.dtype float32, not {model.dtype}",
    )


def _validate_optimizer(optimizer: OptimizerConfig) -> None:
    p, variant = optimizer.p, optimizer.variant
    check(p >= 2, "optimizer.p", p, "it must be a number >= 2, or inf")
    check(
        p != math.inf or variant == "p2" or optimizer.name != "stacey",
        "optimizer.p",
        p,
        f"it must be finite for optimizer.variant = {variant}",
    )
    check(
        p <= 1000 or variant == "p2" or optimizer.name != "stacey",
        "optimizer.p",
        p,
        f"it must be at most 1000 for optimizer.variant = {variant}",
    )
    check(optimizer.lr > 0 or optimizer.name != "lion", "optimizer.lr", optimizer.lr, "lion needs it > 0")
    check(0 <= optimizer.tau <= 1, "optimizer.tau", optimizer.tau, "it must be within [0, 1]")
    check(
        all(0 <= beta < 1 for beta in optimizer.betas),
        "optimizer.betas",
        list(optimizer.betas),
        "each must be within [0, 1)",
    )
    check(0 <= optimizer.momentum < 1, "optimizer.momentum", optimizer.momentum, "it must be within [0, 1)")


def _validate_checkpoint(checkpoint: CheckpointConfig) -> None:
    names = ", ".join(CHANGES_TO_ALLOW)
    for name in checkpoint.allow_changes:
        check(name in CHANGES_TO_ALLOW, "checkpoint.allow_changes", name, f"it may name {names}")
    source = checkpoint.resume_from
    check(
        source is None or checkpoint.resume != "never",
        "checkpoint.resume",
        checkpoint.resume,
        f"checkpoint.resume_from = {source} has to be resumed, now and when the run was interrupted",
    )


def check(condition: bool, setting: str, value: Any, allowed: str) -> None:
    """Raise SettingsError naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise SettingsError(f"{setting}: {value} is not allowed; {allowed}")
