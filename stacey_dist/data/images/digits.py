"""Digits drawn by strokes, each image a function of (seed, split, number), the same bits on every machine.

A digit is a few curves through control points. Every image moves the points, turns, slants and scales the digit,
draws it with a pen of another width and strength, and adds stray lines and noise.

Only additions, multiplications, divisions and square roots of IEEE 754 are used, and no sums whose order a library
chooses: sines and exponentials would differ in their last bits between machines.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.images.image_set import ArrayImages
from stacey_dist.data.sampler import uniforms

SIDE = 28
CLASSES = 10

Floats = NDArray[np.float32]
Stroke = Sequence[tuple[float, float]]

# (x, y) from 0 to 1, y downwards. A digit has one or more forms, a form one or more strokes, each a smooth curve.
_LOOP = ((0.5, 0.02), (0.82, 0.1), (0.92, 0.5), (0.82, 0.9), (0.5, 0.98), (0.18, 0.9), (0.08, 0.5), (0.18, 0.1))
_FORMS: tuple[tuple[tuple[Stroke, ...], ...], ...] = (
    (((*_LOOP, _LOOP[0]),),),
    (
        (((0.5, 0.02), (0.5, 0.98)),),
        (((0.25, 0.28), (0.55, 0.02)), ((0.55, 0.02), (0.55, 0.98))),
        (((0.3, 0.2), (0.52, 0.02)), ((0.52, 0.02), (0.52, 0.98)), ((0.25, 0.98), (0.8, 0.98))),
    ),
    ((((0.12, 0.3), (0.25, 0.0), (0.8, 0.0), (0.88, 0.4), (0.5, 0.65), (0.1, 0.97)), ((0.1, 0.97), (0.92, 0.95))),),
    (
        (
            ((0.12, 0.15), (0.4, -0.02), (0.9, 0.05), (0.85, 0.4), (0.4, 0.47)),
            ((0.4, 0.47), (0.95, 0.5), (0.95, 0.95), (0.45, 1.05), (0.08, 0.85)),
        ),
        (
            ((0.12, 0.03), (0.85, 0.03)),
            ((0.85, 0.03), (0.45, 0.42)),
            ((0.45, 0.42), (0.98, 0.45), (0.92, 0.98), (0.4, 1.03), (0.08, 0.85)),
        ),
    ),
    (
        (((0.3, 0.02), (0.1, 0.6)), ((0.1, 0.6), (0.92, 0.58)), ((0.72, 0.25), (0.68, 0.98))),
        (((0.66, 0.02), (0.06, 0.66)), ((0.06, 0.66), (0.95, 0.66)), ((0.66, 0.02), (0.66, 0.98))),
    ),
    (
        (
            ((0.82, 0.03), (0.24, 0.03)),
            ((0.24, 0.03), (0.18, 0.45)),
            ((0.18, 0.45), (0.5, 0.3), (0.98, 0.45), (0.9, 0.95), (0.4, 1.05), (0.1, 0.85)),
        ),
    ),
    (
        (
            ((0.72, 0.02), (0.3, 0.2), (0.02, 0.65), (0.2, 1.02), (0.7, 1.02), (0.98, 0.7), (0.65, 0.42), (0.25, 0.55)),
        ),
        (((0.4, 0.02), (0.15, 0.4), (0.08, 0.9), (0.5, 1.05), (0.95, 0.85), (0.75, 0.48), (0.35, 0.55), (0.15, 0.75)),),
    ),
    (
        (((0.1, 0.05), (0.9, 0.05)), ((0.9, 0.05), (0.58, 0.5), (0.42, 0.98))),
        (((0.1, 0.05), (0.9, 0.05)), ((0.9, 0.05), (0.58, 0.5), (0.42, 0.98)), ((0.35, 0.5), (0.82, 0.5))),
    ),
    (
        (
            ((0.5, 0.47), (0.1, 0.3), (0.2, -0.02), (0.8, -0.02), (0.9, 0.3), (0.5, 0.47)),
            ((0.5, 0.47), (0.02, 0.65), (0.15, 1.02), (0.85, 1.02), (0.98, 0.65), (0.5, 0.47)),
        ),
    ),
    (
        (
            ((0.85, 0.25), (0.65, 0.55), (0.2, 0.5), (0.08, 0.1), (0.5, -0.05), (0.88, 0.1)),
            ((0.88, 0.1), (0.86, 0.55), (0.62, 0.98)),
        ),
        (((0.88, 0.25), (0.6, 0.55), (0.15, 0.45), (0.15, 0.0), (0.65, -0.05), (0.9, 0.3), (0.85, 0.95), (0.3, 1.0)),),
    ),
)  # fmt: skip

# Where in an image's random numbers each choice finds its own.
_FORM, _TURN, _SLANT, _WIDTH, _HEIGHT, _X, _Y, _PEN, _STRENGTH, _SOFTNESS, _NOISE, _LINE = range(12)
_STRAY = 2  # lines, of five numbers each: where it begins and ends, and its strength
_POINTS = _LINE + 5 * _STRAY
_MOST_POINTS = max(sum(map(len, form)) for forms in _FORMS for form in forms)
_PIXELS = _POINTS + 2 * _MOST_POINTS
_NUMBERS = _PIXELS + SIDE * SIDE

_JITTER = 0.11
_AT_ONCE = 256


def drawn_digits() -> tuple[ArrayImages, ArrayImages]:
    """Return (train, validation): 5 000 and 1 000 digits, as RGB of 28 x 28, as many of each digit.

    They are the same on every machine and in every run.
    """

    def images(split: int, count: int, name: str) -> ArrayImages:
        pixels, labels = draw(0, split, count)
        classes = [str(label) for label in range(CLASSES)]
        return ArrayImages(pixels[..., None].repeat(3, axis=3), labels, classes, f"drawn digits, {name} image")

    return images(0, 5000, "training"), images(1, 1000, "held-out")


def draw(seed: int, split: int, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return (images, labels): ``count`` digits, grey on black, of shape (count, 28, 28), and which digits they are.

    Args:
        seed: of all random numbers.
        split: another one has other images.
        count: how many; image i shows the digit i % 10, and does not depend on ``count``.
    """
    labels = np.arange(count, dtype=np.int64) % CLASSES
    images = np.empty((count, SIDE, SIDE), np.uint8)
    for label, forms in enumerate(_FORMS):
        numbers = np.arange(label, count, CLASSES)
        for start in range(0, len(numbers), _AT_ONCE):
            chosen = numbers[start : start + _AT_ONCE]
            random = np.stack([uniforms(seed, split, int(i), _NUMBERS) for i in chosen]).astype(np.float32)
            form = (random[:, _FORM] * len(forms)).astype(np.int64)
            for number, strokes in enumerate(forms):
                mine = form == number
                if mine.any():
                    images[chosen[mine]] = _drawn(strokes, random[mine])
    return images, labels


def _drawn(strokes: Sequence[Stroke], random: Floats) -> NDArray[np.uint8]:
    """Return images of one form of a digit, one for each row of random numbers."""

    def between(which: int, low: float, high: float) -> Floats:
        result: Floats = np.float32(low) + np.float32(high - low) * random[:, which, None]
        return result

    pen = between(_PEN, 0.8, 1.7)
    digit = _ink(_placed(strokes, random, between), pen, between(_SOFTNESS, 0.5, 1.0))
    grey = between(_STRENGTH, 0.5, 1.0) * digit
    for at in range(_LINE, _POINTS, 5):
        ends = np.float32(SIDE) * random[:, at : at + 4]
        grey = np.maximum(grey, between(at + 4, 0.0, 0.6) * _ink([(ends[:, :2], ends[:, 2:])], pen, np.float32(0.7)))
    grey = grey + between(_NOISE, 0.0, 0.5) * (random[:, _PIXELS:] - np.float32(0.5))
    return np.floor(np.clip(grey, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8).reshape(-1, SIDE, SIDE)


def _placed(
    strokes: Sequence[Stroke], random: Floats, between: Callable[[int, float, float], Floats]
) -> list[tuple[Floats, Floats]]:
    """Return the line segments of the strokes, bent, slanted, turned and moved: both ends, each of shape (n, 2)."""
    half = between(_TURN, -0.2, 0.2)  # the tangent of half the angle, which is up to 23 degrees
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    width, height, slant = between(_WIDTH, 8, 17), between(_HEIGHT, 12, 20), between(_SLANT, -0.4, 0.4)
    centre = np.float32(SIDE / 2)
    left, top = centre + between(_X, -3, 3), centre + between(_Y, -3, 3)
    segments, at = [], _POINTS
    for stroke in strokes:
        # Each stroke by itself: where two meet a gap may open, as in handwriting.
        moved = np.float32(_JITTER) * (2 * random[:, at : at + 2 * len(stroke)].reshape(-1, len(stroke), 2) - 1)
        at += 2 * len(stroke)
        points = np.asarray(stroke, np.float32) - np.float32(0.5) + moved
        x = width * (points[:, :, 0] - slant * points[:, :, 1])
        y = height * points[:, :, 1]
        placed = np.stack([left + cosine * x - sine * y, top + sine * x + cosine * y], axis=2)
        curve = _smooth(placed.astype(np.float32))
        segments += [(curve[:, i], curve[:, i + 1]) for i in range(curve.shape[1] - 1)]
    return segments


def _smooth(points: Floats) -> Floats:
    """Return a curve near the points, (n, points, 2), by cutting corners twice (Chaikin's algorithm); its ends stay."""
    for _ in range(2 if points.shape[1] > 2 else 0):
        before, after = points[:, :-1], points[:, 1:]
        cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], axis=2)
        inner = cut.reshape(len(points), -1, 2)[:, 1:-1]
        points = np.concatenate([points[:, :1], inner, points[:, -1:]], axis=1).astype(np.float32)
    return points


def _ink(segments: Sequence[tuple[Floats, Floats]], pen: Floats, softness: Floats | np.float32) -> Floats:
    """Return how dark each pixel is, (n, pixels) from 0 to 1: 1 nearer to a segment than half the pen, then falling."""
    places = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
    x, y = np.tile(places, SIDE)[None], np.repeat(places, SIDE)[None]
    nearest = np.full((len(segments[0][0]), SIDE * SIDE), np.float32(1e6))
    for start, end in segments:
        along = end - start
        dx, dy = along[:, :1], along[:, 1:]
        from_x, from_y = x - start[:, :1], y - start[:, 1:]
        share = (from_x * dx + from_y * dy) / (dx * dx + dy * dy + np.float32(1e-6))
        share = np.clip(share, 0, 1)
        off_x, off_y = from_x - share * dx, from_y - share * dy
        nearest = np.minimum(nearest, off_x * off_x + off_y * off_y)
    return np.clip((pen - np.sqrt(nearest)) * softness + np.float32(0.5), 0, 1)
