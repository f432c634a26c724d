"""Images a second on one core: this pipeline, alone and with each cache, against the usual Pillow loader, in turns.

    python benchmarks/image_pipeline.py [DIRECTORY] [--rounds N] [--size N]

DIRECTORY holds photos, or folders of photos; without it, photos of 500 x 375 are made. One thread of one process;
every loader makes the same crops. The usual loader is `Image.open(file).convert("RGB")`, crop, `resize(BILINEAR)`,
mirror and a uint8 tensor, what torchvision's transforms do with a Pillow image.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stacey_dist.data.images import ImageSet, Transform, cached, read_pixels
from stacey_dist.data.images.augment import random_rectangle
from stacey_dist.data.images.decode import FORMATS
from stacey_dist.data.images.listing import IMAGE_SUFFIXES
from stacey_dist.data.sampler import uniforms
from stacey_dist.info import machine

CACHE_RESIZE_TO = 256


class Files:
    """Encoded photos in memory: what a disk takes is not measured."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files
        self.classes = ["any"]
        self.labels = np.zeros(len(files), dtype=np.int64)
        self.identity = "photos"

    def __len__(self) -> int:
        return len(self.files)

    def read(self, i: int) -> bytes:
        return self.files[i]

    def name(self, i: int) -> str:
        return f"photo {i}"


def made_photo(seed: int) -> bytes:
    """Return a 500 x 375 JPEG with gradients, texture and edges: about as many bytes as ImageNet's."""
    generator = np.random.default_rng(seed)
    picture = np.zeros((375, 500, 3))
    for cells, weight in ((4, 110.0), (16, 60.0), (64, 40.0), (160, 25.0)):
        coarse = generator.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        resized = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        picture += np.asarray(resized) * (weight / 235.0)
    for _ in range(12):
        top, left = generator.integers(0, 300), generator.integers(0, 420)
        picture[top : top + 60, left : left + 70] *= generator.uniform(0.5, 1.3, 3)
    noisy = np.clip(picture + generator.normal(0.0, 6.0, picture.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=92)
    return file.getvalue()


def with_pillow(data: bytes, transform: Transform, sample: int) -> torch.Tensor:
    """Load as usual, with this pipeline's random numbers."""
    image = Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
    numbers = uniforms(0, 0, sample, 23).tolist()
    top, left, height, width = random_rectangle(image.height, image.width, transform.min_scale, numbers)
    size = (transform.size, transform.size)
    image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
    if numbers[0] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def with_this(images: ImageSet, transform: Transform, i: int, row: NDArray[np.uint8]) -> None:
    """Do what a worker of ImageLoader does for an image of its batch."""
    row[:] = transform.training(read_pixels(images, i), 0, 0, i)


def seconds(work: Callable[[int], object], count: int) -> float:
    """Return seconds of the processor, which other programs on the machine do not change much."""
    begin = time.process_time()
    for i in range(count):
        work(i)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.directory is None:
        files = [made_photo(seed) for seed in range(60)]
    else:
        found = sorted(p for p in options.directory.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files = [path.read_bytes() for path in found[:1000]]
    transform = Transform(options.size, "random_resized", flip=True)
    count = len(files)
    batch = np.empty((count, options.size, options.size, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as directory:
        plain = Files(files)
        sets: dict[str, ImageSet] = {
            "this pipeline": plain,
            "... cache: decoded": cached(plain, "decoded", Path(directory), progress=False),
            "... cache: resized": cached(plain, "resized", Path(directory), CACHE_RESIZE_TO, progress=False),
        }
        ways: dict[str, Callable[[int], object]] = {"Pillow": lambda i: with_pillow(files[i], transform, i)}
        for name, images in sets.items():
            ways[name] = lambda i, images=images: with_this(images, transform, i, batch[i])  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, work in ways.items():
                taken = seconds(work, count)
                if turn:  # the first one warms up
                    times[name].append(taken / count)
        differences = []
        for i in range(count):
            with_this(plain, transform, i, batch[i])
            reference = with_pillow(files[i], transform, i).permute(1, 2, 0).numpy()
            differences.append(np.abs(batch[i].astype(np.int64) - reference).mean())
    print(machine())
    print(f"{count} photos, {sum(map(len, files)) / count / 1e3:.0f} kB on average; random crops of {options.size}")
    print(f"{'images a second of one core':30} {'median':>8} {'best':>8}   times Pillow: median of pairs, least, most")
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times["Pillow"], values, strict=True)]
        print(
            f"{name:30} {1 / statistics.median(values):8.0f} {1 / min(values):8.0f}   "
            f"{statistics.median(ratios):.2f}, {min(ratios):.2f}, {max(ratios):.2f}"
        )
    print(f"pixels differ from Pillow's by {statistics.mean(differences):.4f} grey levels on average")


if __name__ == "__main__":
    main()
