"""A run on an engine as a plan sees it, and what of it has to fit into a GPU."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from stacey_dist.errors import SettingsError
from stacey_dist.plan.activations import Activations, Arithmetic, activations
from stacey_dist.plan.engines import Held, Setup, fullest
from stacey_dist.plan.model import Llama
from stacey_dist.training.config import OptimizerConfig
from stacey_dist.training.llm_config import LLMConfig

Precision = Literal["no", "bf16", "fp16"]
DEEPSPEED = ("zero1", "zero2", "zero3", "zero3_offload")
GIVES_OUT_WEIGHTS = ("zero3", "zero3_offload", "fsdp2", "hsdp")
WITHOUT_AUTOCAST = (*DEEPSPEED, "fsdp2", "hsdp")


@dataclass(frozen=True)
class Job:
    """A model, an optimizer and a batch on so many GPUs.

    Attributes:
        config: the launcher's configuration. Its optimizer, batch and precision are what counts.
        model: its model.
        engine: a name of `stacey_dist.plan.engines.ENGINES`.
        nodes, gpus_per_node: one process a GPU.

    Raises:
        SettingsError: the engine, precision and number of GPUs do not go together, or the batch does not divide.
    """

    config: LLMConfig
    model: Llama
    engine: str
    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        ranks, batch = self.ranks, self.config.train.global_batch_size
        if self.engine == "single" and ranks > 1:
            raise SettingsError(f"--engine: single is one process, and there are {ranks}; take another engine")
        if self.engine == "hsdp" and self.nodes < 2:
            raise SettingsError("--engine: hsdp keeps replicas on several nodes; --nodes 1 is fsdp2")
        low = self.config.model.dtype != "float32"
        if low and (self.precision != "no" or self.engine in DEEPSPEED):
            raise SettingsError(
                "model.dtype: bfloat16 is planned without mixed precision (--mixed-precision no) and without DeepSpeed"
            )
        if batch % ranks:
            raise SettingsError(
                f"train.global_batch_size: {batch} is not a multiple of the {ranks} GPUs; see --global-batch-size"
            )
        if (batch // ranks) % self.micro_batch:
            raise SettingsError(
                f"train.micro_batch_size: {self.micro_batch} does not divide train.global_batch_size / GPUs = "
                f"{batch // ranks}; see --micro-batch-size"
            )

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.nodes * self.gpus_per_node

    @property
    def host_bytes_to_build(self) -> int:
        """Host memory of the first node while the model is built: one process's float32 weights, or each one's."""
        return 4 * self.model.elements * (1 if self.engine in GIVES_OUT_WEIGHTS else self.gpus_per_node)

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass."""
        return self.config.train.micro_batch_size or max(1, self.config.train.global_batch_size // self.ranks)

    @property
    def accumulation(self) -> int:
        """Micro-batches of an update on a rank."""
        return self.config.train.global_batch_size // self.ranks // self.micro_batch

    @property
    def precision(self) -> Precision:
        """Mixed precision; where neither the configuration nor an option says it, bf16 as in configs/accelerate."""
        return self.config.train.mixed_precision or ("bf16" if self.config.model.dtype == "float32" else "no")

    @property
    def arithmetic(self) -> Arithmetic:
        """In which dtypes forward and backward compute."""
        if self.config.model.dtype != "float32":
            return "low"
        if self.precision == "no":
            return "float32"
        return "low" if self.engine in WITHOUT_AUTOCAST else "autocast"

    @cached_property
    def setup(self) -> Setup:
        """What the engine is given."""
        weight = 4 if self.config.model.dtype == "float32" else 2
        return Setup(
            model=self.model,
            groups=self.model.groups(decay_norms=self.config.optimizer.decay_norms_and_biases),
            ranks=self.ranks,
            shard_ranks=self.gpus_per_node,
            weight=weight,
            compute=weight if self.precision == "no" else 2,
            state=state_bytes(self.config.optimizer),
            accumulation=self.accumulation,
        )

    @cached_property
    def _fullest(self) -> tuple[int, Held]:
        return fullest(self.engine, self.setup)

    @property
    def rank(self) -> int:
        """The rank that holds most."""
        return self._fullest[0]

    @property
    def held(self) -> Held:
        """What that rank keeps."""
        return self._fullest[1]

    @property
    def activations(self) -> Activations:
        """Of a micro-batch."""
        train, length = self.config.train, self.config.data.sequence_length
        checkpointing = train.gradient_checkpointing
        return activations(self.model, self.micro_batch, length, self.arithmetic, checkpointing=checkpointing)

    @property
    def peak(self) -> int:
        """Bytes on the fullest rank's GPU at most: in forward and backward, or in the update.

        Gradients are counted as a whole beside all activations: from an update's second micro-batch on they are.
        """
        held = self.held
        passes = sum(held.buffers.values()) + self.activations.peak
        return sum(held.device.values()) + max(passes, held.update)

    def with_batch(self, micro: int, *, checkpointing: bool | None = None, batch: int | None = None) -> "Job":
        """The same with another micro-batch, and other gradient checkpointing or global batch if given."""
        train = self.config.train
        train = replace(
            train,
            micro_batch_size=micro,
            gradient_checkpointing=train.gradient_checkpointing if checkpointing is None else checkpointing,
            global_batch_size=batch or train.global_batch_size,
        )
        return replace(self, config=replace(self.config, train=train))

    def with_adamw(self) -> "Job":
        """The same with AdamW in place of the optimizer."""
        return replace(self, config=replace(self.config, optimizer=OptimizerConfig(name="adamw")))

    def largest_micro_batch(self, memory: float) -> int:
        """Sequences of the largest micro-batch, of any global batch, whose peak is within `memory` bytes; 0 if none."""

        def fits(micro: int) -> bool:
            return self.with_batch(micro, batch=2 * micro * self.ranks).peak <= memory

        low, high = 0, 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def state_bytes(optimizer: OptimizerConfig) -> dict[str, int]:
    """Bytes of an element in each of an optimizer's states, beside float32 weights; torch's own have float32 ones."""
    match optimizer.name:
        case "stacey":
            size = 2 if optimizer.state_dtype == "bfloat16" else 4
            return {"z": size, "m": size}
        case "adamw" | "adam":
            return {"exp_avg": 4, "exp_avg_sq": 4}
        case "lion":
            return {"exp_avg": 4}
        case "sgd":
            return {"momentum_buffer": 4} if optimizer.momentum else {}
        case _:
            return {}
