"""A run as a plan sees it: a model, an optimizer and a batch on an engine and so many GPUs."""

from dataclasses import dataclass, replace
from typing import Literal

from stacey_dist.errors import SettingsError
from stacey_dist.plan.activations import Arithmetic
from stacey_dist.plan.model import Model, Parameter
from stacey_dist.training.optimizers import check_engine
from stacey_dist.training.settings.config import Checkpointing, OptimizerConfig
from stacey_dist.training.settings.llm_config import LLMConfig

Precision = Literal["no", "bf16", "fp16"]
DEEPSPEED = ("zero1", "zero2", "zero3", "zero3_offload")
_WITHOUT_AUTOCAST = (*DEEPSPEED, "fsdp2", "hsdp")


@dataclass(frozen=True)
class Job:
    """A model, an optimizer and a batch on so many GPUs.

    Attributes:
        config: the launcher's configuration. Its optimizer, batch and precision are what counts.
        model: its model.
        engine: a name of `stacey_dist.plan.memory.ENGINES`.
        nodes, gpus_per_node: one process a GPU.

    Raises:
        SettingsError: the engine, precision and number of GPUs do not go together, or the batch does not divide.
    """

    config: LLMConfig
    model: Model
    engine: str
    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        check_engine(self.config.optimizer.name, "deepspeed" if self.engine in DEEPSPEED else self.engine)
        if self.engine == "single" and self.ranks > 1:
            raise SettingsError(f"--engine: single is one process, and there are {self.ranks}; take another engine")
        if self.engine == "hsdp" and self.nodes < 2:
            raise SettingsError("--engine: hsdp keeps replicas on several nodes; --nodes 1 is fsdp2")
        if self.weight_bytes < 4 and (self.precision != "no" or self.engine in DEEPSPEED):
            raise SettingsError(
                "model.dtype: bfloat16 is planned without mixed precision (--mixed-precision no) and without DeepSpeed"
            )
        batch = self.config.train.global_batch_size
        if batch % self.ranks:
            raise SettingsError(
                f"train.global_batch_size: {batch} is not a multiple of the {self.ranks} GPUs; see --global-batch-size"
            )
        if self.rank_batch % self.micro_batch:
            raise SettingsError(
                f"train.micro_batch_size: {self.micro_batch} does not divide train.global_batch_size / GPUs = "
                f"{self.rank_batch}; see --micro-batch-size"
            )

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.nodes * self.gpus_per_node

    @property
    def shard_ranks(self) -> int:
        """The number of processes that share one copy of the states, where the engine shards them."""
        return self.gpus_per_node if self.engine == "hsdp" else self.ranks

    @property
    def rank_batch(self) -> int:
        """Sequences of an update on a rank."""
        return self.config.train.global_batch_size // self.ranks

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass."""
        return self.config.train.micro_batch_size or max(1, self.rank_batch)

    @property
    def accumulation(self) -> int:
        """Micro-batches of an update on a rank."""
        return self.rank_batch // self.micro_batch

    @property
    def precision(self) -> Precision:
        """Mixed precision; where neither the configuration nor an option says it, bf16 as in configs/accelerate."""
        return self.config.train.mixed_precision or ("bf16" if self.weight_bytes == 4 else "no")

    @property
    def arithmetic(self) -> Arithmetic:
        """In which dtypes forward and backward compute."""
        if self.compute_bytes == 4:
            return "float32"
        return "low" if self.weight_bytes == 2 or self.engine in _WITHOUT_AUTOCAST else "autocast"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as the program makes it: 4, or 2 for model.dtype bfloat16."""
        return 4 if self.config.model.dtype == "float32" else 2

    @property
    def compute_bytes(self) -> int:
        """Bytes of a weight in forward and backward: 2 in mixed precision."""
        return self.weight_bytes if self.precision == "no" else 2

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of an element in each of the optimizer's states, by name; torch's own optimizers have float32 ones."""
        optimizer = self.config.optimizer
        match optimizer.name:
            case "stacey":
                size = 2 if optimizer.state_dtype == "bfloat16" else 4
                return {"z": size, "m": size}
            case "adamw" | "adam":
                return {"exp_avg": 4, "exp_avg_sq": 4}
            case "ademamix":
                return {"exp_avg": 4, "exp_avg_sq": 4, "exp_avg_slow": 4}
            case "lion":
                return {"exp_avg": 4}
            case "sgd" if optimizer.momentum:
                return {"momentum_buffer": 4}
        return {}

    @property
    def groups(self) -> list[list[Parameter]]:
        """The model's parameters in the optimizer's groups: norms and biases apart, if they have no weight decay."""
        every = self.model.parameters
        if self.config.optimizer.decay_norms_and_biases:
            return [every]
        groups = [p for p in every if len(p.shape) > 1], [p for p in every if len(p.shape) <= 1]
        return [group for group in groups if group]

    def with_batch(self, micro: int, *, checkpointing: Checkpointing | None = None, batch: int | None = None) -> "Job":
        """Return the same job with another micro-batch, and other gradient checkpointing or global batch if given."""
        train = self.config.train
        train = replace(
            train,
            micro_batch_size=micro,
            gradient_checkpointing=train.gradient_checkpointing if checkpointing is None else checkpointing,
            global_batch_size=batch or train.global_batch_size,
        )
        return replace(self, config=replace(self.config, train=train))

    def with_adamw(self) -> "Job":
        """Return the same job with AdamW in place of the optimizer."""
        adamw = OptimizerConfig("adamw", decay_norms_and_biases=self.config.optimizer.decay_norms_and_biases)
        return replace(self, config=replace(self.config, optimizer=adamw))
