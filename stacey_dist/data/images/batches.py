"""What worker processes do: decode and crop the images of a batch."""

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from stacey_dist.data.images.augment import Transform
from stacey_dist.data.images.decode import BrokenImageError, read_pixels
from stacey_dist.data.images.image_set import ImageSet
from stacey_dist.data.images.workers import MORE_SHARED_MEMORY
from stacey_dist.data.sampler import GlobalSampler
from stacey_dist.data.tokens import IGNORED_LABEL
from stacey_dist.errors import SettingsError

_MOST_BROKEN = 1000
"""So many broken images one after another: it is not they that are broken."""

Answer = tuple[Tensor, Tensor, list[tuple[int, str]]]
"""What a worker sends: pixels (n, size, size, 3), labels, and the broken images it met, as (number, reason)."""


class TrainingBatches(Dataset):
    """The batch at global positions [first, first + count), made in a worker."""

    def __init__(self, images: ImageSet, transform: Transform, sampler: GlobalSampler, seed: int) -> None:
        self.images, self.transform, self.sampler, self.seed = images, transform, sampler, seed

    def __getitem__(self, place: tuple[int, int]) -> Answer | SettingsError:
        first, count = place
        size = self.transform.size
        pixels = torch.empty((count, size, size, 3), dtype=torch.uint8)
        labels = torch.empty(count, dtype=torch.int64)
        if (full := _share(pixels, labels)) is not None:
            return full
        broken: list[tuple[int, str]] = []
        rows = pixels.numpy()
        for row, sample in enumerate(self.sampler.samples(first, count).tolist()):
            epoch = (first + row) // len(self.images)
            for tried in range(min(len(self.images), _MOST_BROKEN)):
                i = (sample + tried) % len(self.images)
                try:
                    image = read_pixels(self.images, i)
                except BrokenImageError as error:
                    broken.append((i, str(error)))
                    continue
                except OSError as error:
                    return _gone(self.images, i, error)
                # The randomness of the place, so that an image which stands in for another is cropped otherwise.
                rows[row] = self.transform.training(image, self.seed, epoch, sample)
                labels[row] = int(self.images.labels[i])
                break
            else:
                return SettingsError(
                    f"data: none of {tried + 1} images from {self.images.name(sample)} on can be read: {broken[-1][1]}"
                )
        return pixels, labels, broken


class EvaluationBatches(Dataset):
    """The batch of a process's places [start, start + count), made in a worker."""

    def __init__(self, images: ImageSet, transform: Transform, process_index: int, num_processes: int) -> None:
        self.images, self.transform = images, transform
        self.process_index, self.num_processes = process_index, num_processes

    def __getitem__(self, place: tuple[int, int]) -> Answer | SettingsError:
        start, count = place
        size = self.transform.size
        pixels = torch.zeros((count, size, size, 3), dtype=torch.uint8)
        labels = torch.full((count,), IGNORED_LABEL)
        if (full := _share(pixels, labels)) is not None:
            return full
        broken: list[tuple[int, str]] = []
        rows = pixels.numpy()
        for row in range(count):
            i = (start + row) * self.num_processes + self.process_index
            if i < len(self.images):
                try:
                    rows[row] = self.transform.evaluation(read_pixels(self.images, i))
                    labels[row] = int(self.images.labels[i])
                except BrokenImageError as error:
                    broken.append((i, str(error)))
                except OSError as error:
                    return _gone(self.images, i, error)
        return pixels, labels, broken


def _gone(images: ImageSet, i: int, error: OSError) -> SettingsError:
    """What a worker returns: what it raises arrives as pages of its stack."""
    return SettingsError(f"data: {images.name(i)} can no longer be read: {error}")


def _share(*tensors: Tensor) -> SettingsError | None:
    """Put what a worker is about to fill where the training process can map it; returns what is wrong if it cannot.

    Torch would do so when the batch is sent, in a thread whose error nobody hears of.
    """
    if get_worker_info() is None:
        return None
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        reason = str(error).splitlines()[0]
        return SettingsError(f"data.workers: no room for a batch of {size:.1f} MB ({reason}); {MORE_SHARED_MEMORY}")
    return None
