"""Images for training: folders, parquet, CIFAR, drawn digits; decoding, random crops, caches, batches.

Importing this package loads torch, and not transformers.
"""

from stacey_dist.data.images.arrow import ArrowImages, hub_images, parquet_images
from stacey_dist.data.images.augment import Crop, Transform
from stacey_dist.data.images.cache import Cache, CachedImages, cached
from stacey_dist.data.images.cifar import cifar_images
from stacey_dist.data.images.decode import BrokenImageError, decode, read_pixels
from stacey_dist.data.images.embedded import embedded_images
from stacey_dist.data.images.folder import FolderImages, folder_images
from stacey_dist.data.images.image_set import ArrayImages, ImageSet
from stacey_dist.data.images.loader import ImageBatch, ImageLoader, evaluation_batches
from stacey_dist.data.images.open import open_images
from stacey_dist.data.images.workers import Workers
from stacey_dist.data.tokens import IGNORED_LABEL

__all__ = [
    "IGNORED_LABEL",
    "ArrayImages",
    "ArrowImages",
    "BrokenImageError",
    "Cache",
    "CachedImages",
    "Crop",
    "FolderImages",
    "ImageBatch",
    "ImageLoader",
    "ImageSet",
    "Transform",
    "Workers",
    "cached",
    "cifar_images",
    "decode",
    "embedded_images",
    "evaluation_batches",
    "folder_images",
    "hub_images",
    "open_images",
    "parquet_images",
    "read_pixels",
]
