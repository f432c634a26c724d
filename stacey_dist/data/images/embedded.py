"""The default images: drawn digits, for a first run without a download."""

from stacey_dist.data.images.digits import CLASSES, draw
from stacey_dist.data.images.image_set import ArrayImages

TRAINING, HELD_OUT = 5000, 1000
_SEED = 0


def embedded_images() -> tuple[ArrayImages, ArrayImages]:
    """Return (train, validation): 5 000 and 1 000 drawn digits, as RGB of 28 x 28, as many of each.

    They are the same on every machine and in every run; see `digits.draw`.
    """
    train, validation = (
        _image_set(split, count, name)
        for split, (count, name) in enumerate([(TRAINING, "training"), (HELD_OUT, "held-out")])
    )
    return train, validation


def _image_set(split: int, count: int, name: str) -> ArrayImages:
    pixels, labels = draw(_SEED, split, count)
    classes = [str(label) for label in range(CLASSES)]
    return ArrayImages(pixels[..., None].repeat(3, axis=3), labels, classes, f"drawn digits, {name} image")
