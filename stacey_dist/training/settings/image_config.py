"""The settings that only `train_imagenet.py` has. The defaults are those of its quickstart."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from stacey_dist.training.settings import optimizer_defaults
from stacey_dist.training.settings.config import (
    SHARED_CHANGES,
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from stacey_dist.training.settings.value_types import (
    FilePath,
    FractionBelowOne,
    NonEmptyPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
)


@dataclass
class ImageModelConfig:
    """The ResNet to build (transformers' ResNetForImageClassification)."""

    depth: Literal[18, 34, 50, 101, 152] = 18
    """Number of layers, as in ResNet-18."""
    stem: Literal["imagenet", "cifar"] = "cifar"
    """The first layers. imagenet: a 7x7 convolution with stride 2 and max-pooling. cifar: a 3x3 convolution."""
    width: PositiveInt = 16
    """Channels of the stem, 64 in the published networks. Other layers scale in proportion."""
    zero_init_residual: bool = False
    """Initialize the weight of each block's last batch norm to 0."""
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over all processes. GPUs only."""

    def build(self, classes: list[str]) -> Any:
        """Return the ResNet, with random weights. Its batch norms are not synchronized yet."""
        from stacey_dist.models import build_resnet  # transformers takes seconds to import

        return build_resnet(
            self.depth, classes, stem=self.stem, width=self.width, zero_init_residual=self.zero_init_residual
        )


@dataclass
class ImageDataConfig:
    """The training data. If neither path nor dataset is set: drawn digits, 5 000 to train on and 1 000 held out."""

    path: str | None = None
    """Directory of an ImageNet tree (train/CLASS/*.JPEG, val/CLASS/...), the hub's parquet files, or CIFAR's own
    files."""
    dataset: str | None = None
    """A dataset on the Hugging Face hub, as in ILSVRC/imagenet-1k."""
    dataset_config: str | None = None
    """The dataset's configuration."""
    dataset_split: str = "train"
    """The split to train on."""
    dataset_validation_split: str = "validation"
    """The split to evaluate on."""
    image_column: str | None = None
    """The column of the images. null: the one that holds images."""
    label_column: str | None = None
    """The column of the labels. null: the one that holds classes."""
    image_size: PositiveInt = 28
    """Height and width of the model's input, in pixels."""
    crop: Literal["random_resized", "padded", "none"] = "padded"
    """Training crops. random_resized: random area and aspect ratio. padded: a random shift, after padding by 1/8. none:
    the center."""
    min_scale: PositiveFraction = 0.08
    """random_resized: the smallest fraction of the image's area."""
    flip: bool = False
    """Flip each training image horizontally with probability 1/2."""
    eval_resize: PositiveInt | None = None
    """For evaluation, resize the shorter side to this, then crop the center. null: resize it to image_size."""
    mean: tuple[float, float, float] = (0.1307, 0.1307, 0.1307)
    """Means of red, green and blue, on a scale from 0 to 1, to subtract."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.3081, 0.3081, 0.3081)
    """Standard deviations of red, green and blue, to divide by."""
    workers: NonNegativeInt | None = None
    """Worker processes per training process that decode images. null: its share of the cores with a GPU, 0 on a CPU."""
    prefetch: PositiveInt = 4
    """Micro-batches that each worker prepares in advance."""
    timeout_seconds: PositiveFloat = 300.0
    """Seconds to wait for a micro-batch from the workers before the run stops with an error."""
    cache: Literal["none", "decoded", "resized"] = "none"
    """Store decoded pixels in cache_dir. resized: with the shorter side at most cache_resize."""
    cache_resize: PositiveInt = 256
    """resized: the largest shorter side of a cached image, in pixels."""
    cache_dir: FilePath | None = None
    """Directory of the cache and the hub's tables, which runs can share. null: run_dir/data."""


@dataclass
class ImageOptimizerConfig(OptimizerConfig):
    """The optimizer and its hyperparameters. Settings that are not given take the optimizer's defaults."""

    defaults: ClassVar[optimizer_defaults.Defaults] = optimizer_defaults.IMAGES
    """The numbers of each optimizer."""


@dataclass
class ImageTrainConfig(TrainConfig):
    """Length, batches, precision, logging and evaluation."""

    label_smoothing: FractionBelowOne = 0.0
    """Label smoothing: the fraction of the target that is spread evenly over all classes."""


@dataclass
class ImageConfig(RunConfig):
    """Train a ResNet on images with STACEY."""

    run_dir: NonEmptyPath = "runs/digits"
    """Directory of the run: configuration, metrics, plots, checkpoints and the exported model."""
    model: ImageModelConfig = field(default_factory=ImageModelConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    optimizer: ImageOptimizerConfig = field(default_factory=ImageOptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(min_lr_ratio=0.0, tau="lr"))
    train: ImageTrainConfig = field(
        default_factory=lambda: ImageTrainConfig(max_steps=700, global_batch_size=64, eval_every_steps=100)
    )
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(every_steps=100, keep_last=1, keep_best=True)
    )

    samples = "images"
    changes_to_allow = (
        *SHARED_CHANGES,
        *(f"model.{f.name}" for f in fields(ImageModelConfig)),
        *(f"data.{name}" for name in ("image_size", "crop", "min_scale", "flip", "mean", "std")),
        "train.label_smoothing",
    )

    def check_rules(self) -> None:
        """Raise SettingsError for values that do not go together."""
        name, data = self.optimizer.name, self.data
        known = name in self.optimizer.defaults or name == "stacey"
        self.require(known, "optimizer.name", "train_imagenet.py does not support it")
        super().check_rules()
        allowed = "give either data.path or data.dataset, not both (--data.dataset null)"
        self.require(not (data.path and data.dataset), "data.dataset", allowed)
        allowed = (
            "data.crop random_resized needs it, as in 256 for images of 224; at least data.image_size "
            f"({data.image_size})"
        )
        self.require(data.eval_resize is not None or data.crop != "random_resized", "data.eval_resize", allowed)
        allowed = f"it must be at least data.image_size = {data.image_size}"
        self.require(data.eval_resize is None or data.eval_resize >= data.image_size, "data.eval_resize", allowed)
        needed = data.eval_resize or data.image_size
        allowed = f"images of the cache would be enlarged; it must be at least {needed}, as evaluation resizes them"
        self.require(data.cache != "resized" or data.cache_resize >= needed, "data.cache_resize", allowed)
        allowed = "transformers' ResNet has none; a smaller train.micro_batch_size saves memory"
        self.require(not self.train.gradient_checkpointing, "train.gradient_checkpointing", allowed)

    def layer_classes(self) -> set[str]:
        """Return the names of the classes of the model's layers."""
        import torch

        with torch.device("meta"):
            return {type(module).__name__ for module in self.model.build(["a", "b"]).modules()}
