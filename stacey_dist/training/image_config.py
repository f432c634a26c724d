"""The settings of `train_imagenet.py` beside the shared ones. The defaults are its quickstart."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from stacey_dist.training import optimizer_defaults
from stacey_dist.training.config import (
    SHARED_CHANGES,
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from stacey_dist.training.value_types import (
    FilePath,
    NonEmptyPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    ShareBelowOne,
)


@dataclass
class ImageModelConfig:
    """The ResNet to build (transformers' ResNetForImageClassification)."""

    depth: Literal[18, 34, 50, 101, 152] = 18
    """Number of layers."""
    stem: Literal["imagenet", "cifar"] = "cifar"
    """The beginning: a 7x7 convolution with stride 2 and max-pooling, or a plain 3x3 convolution."""
    width: PositiveInt = 16
    """Channels of the stem, 64 in the published networks; all else is wider by the usual factors."""
    zero_init_residual: bool = False
    """Begin with the last batch norm of each block at 0."""
    sync_batch_norm: bool = False
    """Batch norms use the statistics of all processes; on GPUs only."""


@dataclass
class ImageDataConfig:
    """The training data. Without path or dataset: drawn digits, 5 000 to train on and 1 000 held out."""

    path: str | None = None
    """An ImageNet tree (train/CLASS/*.JPEG, val/CLASS/...), parquet files as the hub has them, or CIFAR's own files."""
    dataset: str | None = None
    """A dataset on the Hugging Face hub, as in ILSVRC/imagenet-1k."""
    dataset_config: str | None = None
    """The dataset's configuration."""
    dataset_split: str = "train"
    """The split to train on."""
    dataset_validation_split: str = "validation"
    """The split to evaluate on."""
    image_column: str | None = None
    """The column of the images. None: the one that holds images."""
    label_column: str | None = None
    """The column of the labels. None: the one that holds classes."""
    image_size: PositiveInt = 28
    """Height and width of what the network sees."""
    crop: Literal["random_resized", "padded", "none"] = "padded"
    """Training crops: of random area and shape; or as large as the image, after padding it by 1/8; or all of it."""
    min_scale: PositiveShare = 0.08
    """random_resized: the smallest share of the image's area."""
    flip: bool = False
    """Flip training images left to right, each with probability 1/2."""
    eval_resize: PositiveInt | None = None
    """Evaluate on the centre after resizing the shorter side to this. None: resized only where it must be to fit."""
    mean: tuple[float, float, float] = (0.1307, 0.1307, 0.1307)
    """Subtracted from red, green and blue, which go from 0 to 1."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.3081, 0.3081, 0.3081)
    """Divides red, green and blue after that."""
    workers: NonNegativeInt | None = None
    """Processes that decode images, for each training process. None: its share of the cores on a GPU, 0 on a CPU."""
    prefetch: PositiveInt = 4
    """Micro-batches that each of them is ahead."""
    timeout_seconds: PositiveFloat = 300.0
    """A micro-batch that these processes do not give for so long ends the run with an error."""
    cache: Literal["none", "decoded", "resized"] = "none"
    """Keep decoded pixels in cache_dir; resized: with the shorter side at most cache_resize."""
    cache_resize: PositiveInt = 256
    """The longest shorter side in a cache of resized images."""
    cache_dir: FilePath | None = None
    """Where the cache and the hub's tables are kept, for all runs. None: run_dir/data."""


@dataclass
class ImageOptimizerConfig(OptimizerConfig):
    """Which optimizer, and its numbers. Those that are not given are the optimizer's own."""

    defaults: ClassVar[optimizer_defaults.Defaults] = optimizer_defaults.IMAGES
    """The numbers of each optimizer."""


@dataclass
class ImageTrainConfig(TrainConfig):
    """How long, in what batches, and how often to look."""

    label_smoothing: ShareBelowOne = 0.0
    """The share of a label that is spread evenly over all classes."""


@dataclass
class ImageConfig(RunConfig):
    """Train a ResNet on images with STACEY."""

    run_dir: NonEmptyPath = "runs/digits"
    """Directory of the run: configuration, metrics, plots, checkpoints, the exported model."""
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
        self.require(known, "optimizer.name", "it is for language models here")
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
        allowed = "transformers' ResNet has none; a smaller train.micro_batch_size saves memory"
        self.require(not self.train.gradient_checkpointing, "train.gradient_checkpointing", allowed)

    def layer_classes(self) -> set[str]:
        """Return the names of the classes of the model's layers."""
        import torch

        from stacey_dist.models import build_resnet

        with torch.device("meta"):
            model = build_resnet(self.model.depth, ["a", "b"], stem=self.model.stem, width=self.model.width)
        return {type(module).__name__ for module in model.modules()}
