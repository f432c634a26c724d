"""The drawn digits: a function of seed, split and number, the same everywhere, neither trivial nor hopeless."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from stacey_dist.data.images.digits import draw
from tests.data.images.helpers import MODULES_ALONE

ROOT = Path(__file__).parents[3]
# Of the first thousand training images. A change here is another data set: figures of old runs no longer compare.
SHA_256 = "d041f0bbcbb1d5c53f206cc0f80a179180bfdc7645c0e10b88e75fe3a1bba1e1"


def test_an_image_depends_on_its_number_alone() -> None:
    few, labels = draw(3, 1, 37)
    many, _ = draw(3, 1, 700)
    assert np.array_equal(few, many[:37])
    assert labels.tolist() == [i % 10 for i in range(37)]
    assert len({image.tobytes() for image in many}) == 700
    for seed, split in ((4, 1), (3, 0)):
        others, _ = draw(seed, split, 37)
        assert not any(np.array_equal(a, b) for a, b in zip(few, others, strict=True))
    assert draw(0, 0, 0)[0].shape == (0, 28, 28)


def test_they_are_the_same_everywhere() -> None:
    """Whatever instructions numpy has."""
    assert hashlib.sha256(draw(0, 0, 1000)[0].tobytes()).hexdigest() == SHA_256
    code = MODULES_ALONE + (
        "import hashlib; from stacey_dist.data.images.digits import draw\n"
        "print(hashlib.sha256(draw(0, 0, 1000)[0].tobytes()).hexdigest())"
    )
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX AVX2 FMA3 X86_V3 X86_V4"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.strip() == SHA_256, done.stderr


def test_they_are_neither_trivial_nor_hopeless() -> None:
    images, labels = (array.astype(np.float64) for array in draw(0, 0, 3000))
    held_out, expected = draw(0, 1, 1000)
    means = np.stack([images[labels == digit].mean(axis=0).ravel() for digit in range(10)])
    distances = ((held_out.reshape(-1, 1, 784) - means) ** 2).sum(axis=2)
    right = (distances.argmin(axis=1) == expected).mean()
    assert 0.3 < right < 0.8  # of the nearest mean image; guessing: 0.1; a network: above 0.9
