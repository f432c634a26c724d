"""Image classification as a task of the training loop: data, model, loss, evaluation, export."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stacey_dist.data.images import (
    IGNORED_LABEL,
    ImageBatch,
    ImageLoader,
    ImageSet,
    Transform,
    Workers,
    cached,
    evaluation_batches,
    open_images,
)
from stacey_dist.errors import SettingsError, settings_errors
from stacey_dist.models.export import describe_export, describe_model
from stacey_dist.training.ahead import Transfer
from stacey_dist.training.engine import Engine
from stacey_dist.training.export import export
from stacey_dist.training.initial_weights import make_model
from stacey_dist.training.launchers import Parts
from stacey_dist.training.processes.devices import cores_per_process
from stacey_dist.training.processes.signals import stop_requested
from stacey_dist.training.run import Run
from stacey_dist.training.settings.config import data_directory
from stacey_dist.training.settings.image_config import ImageConfig, ImageDataConfig
from stacey_dist.training.settings.value_types import check
from stacey_dist.training.task import Task

SETTINGS = {
    **{field.name: f"data.{field.name}" for field in fields(ImageDataConfig)},
    "validation_split": "data.dataset_validation_split",
    "resize_to": "data.cache_resize",
    "size": "data.image_size",
    "timeout": "data.timeout_seconds",
    "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
}
"""The settings by which the arguments of `stacey_dist.data.images` are given."""


@dataclass(frozen=True)
class ImageData:
    """A run's images, the same on every process, and what becomes of them on their way into the network."""

    train: ImageSet
    validation: ImageSet
    identity: str
    """Differs where the images differ, wherever they lie."""
    transform: Transform
    workers: Workers


@settings_errors(SETTINGS)
def prepare_data(run: Run[ImageConfig]) -> ImageData:
    """Find the configured images, and cache them if the settings say so.

    Raises SettingsError for a path or data set that holds no images in a form that is known, for a setting of the model
    that this device does not have, for batches that are too small for batch norms or too large for the memory.
    """
    data, device = run.config.data, run.accelerator.device.type
    if run.config.model.sync_batch_norm:
        check(device != "cpu", "model.sync_batch_norm", True, "torch synchronizes batch norms on GPUs only")
    _check_batch_norms(run)
    # On a CPU the network has the cores.
    count = data.workers if data.workers is not None else 0 if device == "cpu" else cores_per_process()
    workers = Workers(count, data.prefetch, device == "cuda", data.timeout_seconds, stop_requested)
    workers.check_memory(run.micro_batch_size, data.image_size)
    cache = Path(data.cache_dir or data_directory(run.config.run_dir))

    def work() -> tuple[ImageSet, ImageSet, str]:
        found = open_images(
            data.path,
            data.dataset,
            data.dataset_config,
            data.dataset_split,
            data.dataset_validation_split,
            data.image_column,
            data.label_column,
            str(cache),
        )
        train, validation = (cached(images, data.cache, cache, data.cache_resize) for images in found)
        # One process reads the images of which their identity is made.
        return train, validation, f"{train.identity} {validation.identity}"

    train, validation, identity = run.call_on_main(work)
    run.save_processor = partial(_save_processor, data)
    transform = Transform(data.image_size, data.crop, data.flip, data.min_scale, data.eval_resize)
    run.say(f"data: {len(train):,} training and {len(validation):,} held-out images of {len(train.classes):,} classes")
    return ImageData(train, validation, identity, transform, workers)


def build_model(run: Run[ImageConfig], data: ImageData) -> Any:
    """Build the ResNet of the configuration, see `make_model`."""
    model = run.config.model
    resnet = make_model(run, lambda: model.build(data.train.classes))
    if model.sync_batch_norm:
        resnet = nn.SyncBatchNorm.convert_sync_batchnorm(resnet)
    count = sum(p.numel() for p in resnet.parameters())
    optimizer = run.config.optimizer
    run.say(f"model: ResNet-{model.depth} with {count:,} parameters; {optimizer.name}, lr {optimizer.lr:g}")
    return resnet


class ImageClassification(Task):
    """Classification of images: the `Task` of `train_imagenet.py`."""

    unit = "images"
    loss_label = "cross-entropy, nats per image"

    @settings_errors(SETTINGS)
    def __init__(self, run: Run[ImageConfig], data: ImageData, model: nn.Module) -> None:
        self.run, self.data = run, data
        settings, accelerator = run.config, run.accelerator
        self.batch_size = settings.train.global_batch_size
        self.samples_per_epoch = len(data.train)
        self.data_identity = data.identity
        self.flops_per_unit = 3.0 * _forward_flops(model, settings.data.image_size)
        # Pixels arrive as bytes, a quarter of the traffic, and become (pixel / 255 - mean) / std on the device.
        self._mean, self._std = (
            255 * torch.tensor(values, device=accelerator.device).view(1, 3, 1, 1)
            for values in (settings.data.mean, settings.data.std)
        )
        # Images arrive in channels_last order. In that order oneDNN's AVX2 kernels write past their workspace where a
        # strided 1x1 convolution has fewer than 8 channels (its issue 6035; torch 2.13), which only narrow models have.
        self._row_major = accelerator.device.type == "cpu" and settings.model.width < 8
        self._transfer = Transfer(accelerator.device)
        self._broken: set[int] = set()
        """Held-out images that cannot be read and were named."""
        self._loader = ImageLoader(
            data.train,
            data.transform,
            seed=settings.seed,
            global_batch_size=self.batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            micro_batch_size=run.micro_batch_size,
            workers=data.workers,
        )

    def micro_batches(self, position: int) -> Iterator[ImageBatch]:
        """Yield this process's share of the update's images, in order."""
        with settings_errors(SETTINGS):
            for batch in self._loader.micro_batches(position):
                yield self._on_device(batch)

    def loss(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return the micro-batch's summed cross-entropy over the number of images in the whole update."""
        smoothing = self.run.config.train.label_smoothing
        logits = self._logits(model, batch)
        return F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing) / self.batch_size

    @settings_errors(SETTINGS)
    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return the loss without smoothing and the top-1 and top-5 accuracy, each image counted once."""
        accelerator = self.run.accelerator
        batches = evaluation_batches(
            self.data.validation,
            self.data.transform,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            batch_size=self.run.micro_batch_size,
            broken=self._broken,
            workers=self.data.workers,
        )
        totals = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # images, loss, top-1, top-5
        for batch in map(self._on_device, batches):
            logits, labels = self._logits(model, batch), batch.labels
            guesses = logits.topk(min(5, logits.shape[1])).indices
            right = guesses == labels[:, None]  # nowhere for an image that does not count
            loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
            totals += torch.stack([(labels >= 0).sum(), loss, right[:, 0].sum(), right.sum()])
            if stopping():
                return None
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(totals)
        images, loss, top1, top5 = totals.tolist()
        if images == 0:
            raise SettingsError("data.path: no image of the validation set can be read")
        return {"eval_loss": loss / images, "eval_top1": top1 / images, "eval_top5": top5 / images}

    def score(self, figures: dict[str, float]) -> float:
        """Return the top-1 accuracy."""
        return figures["eval_top1"]

    def close(self) -> None:
        """End the processes that decode images, and say how many could not be read."""
        self._loader.close()
        broken = {"training": self._loader.broken, "held-out": len(self._broken)}
        for kind, count in broken.items():
            if count:
                self.run.say(f"{count} broken image{'s' if count > 1 else ''} of the {kind} data on this process")

    def _logits(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        logits: Tensor = model(pixel_values=(batch.pixels - self._mean) / self._std).logits
        return logits.float()

    def _on_device(self, batch: ImageBatch) -> ImageBatch:
        pixels, labels = self._transfer(batch.pixels, batch.labels)
        return ImageBatch(pixels.contiguous() if self._row_major else pixels, labels)


def _check_batch_norms(run: Run[ImageConfig]) -> None:
    """Raise SettingsError where a batch norm would get a single value a channel, of which there is no variance."""
    settings, size = run.config.model, run.config.data.image_size
    if run.micro_batch_size > 1 or (settings.sync_batch_norm and run.accelerator.num_processes > 1):
        return
    with torch.device("meta"):
        model = settings.build(["one", "other"])
        try:
            model(pixel_values=torch.zeros(1, 3, size, size))
        except ValueError as error:
            raise SettingsError(
                f"train.micro_batch_size: 1 is not allowed with data.image_size {size} and model.stem {settings.stem}: "
                "the images shrink to one pixel, and a batch norm needs more than one; use at least 2"
            ) from error


def _forward_flops(model: nn.Module, image_size: int) -> int:
    """Return the floating-point operations of one image's forward pass."""
    described: Any = model
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        type(described)(described.config)(pixel_values=torch.zeros(2, 3, image_size, image_size))
    return counter.get_total_flops() // 2  # a batch norm refuses a single image that has shrunk to a pixel


def finish(run: Run[ImageConfig], data: ImageData, engine: Engine, checkpoint: Path) -> str:
    """Export the model and the settings of its images; returns the line that says where they are."""
    assert run.save_processor is not None  # `prepare_data` has set it
    exported = export(run, checkpoint, run.save_processor)
    name = describe_model(engine.module)["class"]  # type: ignore[index]
    return describe_export(name, exported)


def _save_processor(settings: ImageDataConfig, directory: Path) -> None:
    """Write how images become inputs, as transformers' AutoImageProcessor reads it."""
    # Not that of transformers' ResNets, which does not crop images of 384 pixels and more.
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": settings.eval_resize or settings.image_size},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": settings.image_size, "width": settings.image_size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


PARTS = Parts(prepare_data, build_model, ImageClassification, finish)
