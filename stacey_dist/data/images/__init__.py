"""Images for training: folders, parquet, CIFAR, drawn digits; decoding, random crops, caches, batches.

Importing this package loads torch, and neither transformers nor datasets.
"""

from stacey_dist.data.images.augment import Transform
from stacey_dist.data.images.cache import CachedImages, cached
from stacey_dist.data.images.decode import BrokenImageError, decode
from stacey_dist.data.images.image_set import ArrayImages, ImageSet, read_pixels
from stacey_dist.data.images.loader import ImageBatch, ImageLoader, evaluation_batches
from stacey_dist.data.images.open import open_images
from stacey_dist.data.images.workers import Workers
from stacey_dist.data.tokens import IGNORED_LABEL

__all__ = [
    "IGNORED_LABEL",
    "ArrayImages",
    "BrokenImageError",
    "CachedImages",
    "ImageBatch",
    "ImageLoader",
    "ImageSet",
    "Transform",
    "Workers",
    "cached",
    "decode",
    "evaluation_batches",
    "open_images",
    "read_pixels",
]
