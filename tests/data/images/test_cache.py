"""Caches: the same pixels, made once, whatever kills the making."""

import json
import os
import pickle
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stacey_dist.data.images import ArrayImages, BrokenImageError, CachedImages, ImageSet, Transform, cached, decode
from stacey_dist.data.images.augment import resize_shorter_side
from stacey_dist.errors import InputError
from tests.data.images.helpers import encoded, picture, same

module = sys.modules[cached.__module__]
SHAPES = [(30, 40), (25, 20), (16, 16), (1, 9), (50, 33), (12, 70), (8, 8), (41, 41), (20, 21), (64, 30), (17, 16)]


class Photos(ArrayImages):
    """JPEG files of many shapes, image 3 broken; counts how often each was read, and may fail."""

    def __init__(self, broken: frozenset[int] = frozenset({3}), changed: int = 0) -> None:
        super().__init__(np.zeros((len(SHAPES), 1, 1, 3), np.uint8), np.arange(len(SHAPES)) % 2, ["a", "b"])
        self.files = [encoded(picture(*shape, seed=i + changed)) for i, shape in enumerate(SHAPES)]
        for i in broken:
            self.files[i] = b"broken"
        self.reads: Counter[int] = Counter()
        self.fails_at = len(SHAPES)
        self.identity = f"photos {changed}"  # type: ignore[misc]

    def read(self, i: int) -> Any:
        if i == self.fails_at:
            raise KeyboardInterrupt
        self.reads[i] += 1
        return self.files[i]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_IMAGES", 4)
    monkeypatch.setattr(module, "sampled", lambda count: [0, 1])


def make(images: ImageSet, directory: Path, cache: Any = "decoded", resize_to: int | None = None) -> ImageSet:
    return cached(images, cache, directory, resize_to, progress=False)


def check(images: ImageSet, photos: Photos, shorter: int | None = None) -> None:
    assert len(images) == len(SHAPES)
    assert images.classes == photos.classes
    assert np.array_equal(images.labels, photos.labels)
    for i in range(len(SHAPES)):
        assert images.name(i) == photos.name(i)
        if photos.files[i] == b"broken":
            with pytest.raises(BrokenImageError, match="was broken when the cache was made"):
                images.read(i)
            continue
        expected = decode(photos.files[i])
        if shorter and min(expected.shape[:2]) > shorter:
            expected = resize_shorter_side(expected, shorter)
        assert np.array_equal(images.read(i), expected)


def test_none_is_no_cache(tmp_path: Path) -> None:
    photos = Photos()
    assert make(photos, tmp_path, "none") is photos
    assert not list(tmp_path.iterdir())


def test_decoded(tmp_path: Path) -> None:
    photos = Photos()
    images = make(photos, tmp_path)
    assert isinstance(images, CachedImages)
    check(images, photos)
    assert images.identity == photos.identity
    photos.reads.clear()
    check(make(photos, tmp_path), photos)
    assert not photos.reads
    assert sorted(p.name for p in images.directory.iterdir()) == [
        "complete.json",
        "lock",
        *(f"part-0000{part}.{kind}" for part in range(3) for kind in ("bin", "index")),
    ]


def test_resized(tmp_path: Path) -> None:
    photos = Photos()
    images = make(photos, tmp_path, "resized", 20)
    check(images, photos, 20)
    identities = {photos.identity, images.identity, make(photos, tmp_path, "resized", 21).identity}
    assert len(identities) == 3
    assert len(list(tmp_path.iterdir())) == 2
    make(photos, tmp_path)
    make(Photos(changed=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_pickled_and_used_without_warnings(tmp_path: Path) -> None:
    images = make(Photos(frozenset()), tmp_path)
    assert np.array_equal(same(images).read(2), images.read(2))
    large = ArrayImages(np.zeros((8, 300, 300, 3), np.uint8), np.zeros(8, int), ["a"])
    assert len(pickle.dumps(make(large, tmp_path))) < len(pickle.dumps(large)) + 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for crop in ("random_resized", "padded", "none"):
            transform = Transform(24, crop, flip=True, eval_resize=30)  # type: ignore[arg-type]
            pixels: Any = images.read(0)
            transform.training(pixels, 0, 0, 0)
            transform.evaluation(pixels)


def test_copies_look_at_no_file_and_maps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_PARTS", 1)
    photos = Photos(frozenset())
    images: Any = make(photos, tmp_path)
    pickled = pickle.dumps(images)
    aside = images.directory.rename(tmp_path / "aside")
    copy = pickle.loads(pickled)
    aside.rename(images.directory)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(len(SHAPES)):
        copy.read(i)
        assert len(os.listdir("/proc/self/fd")) <= before + 1
    check(copy, photos)


def test_all_broken_in_a_part(tmp_path: Path) -> None:
    photos = Photos(frozenset(range(4, 8)))
    check(make(photos, tmp_path), photos)


@pytest.mark.parametrize("killed_at", range(len(SHAPES)))
def test_killed_while_decoding_resumes(tmp_path: Path, killed_at: int) -> None:
    photos = Photos()
    photos.fails_at = max(2, killed_at)  # 0 and 1 are looked at for the space they need
    with pytest.raises(KeyboardInterrupt):
        make(photos, tmp_path)
    photos.fails_at = len(SHAPES)
    photos.reads.clear()
    check(make(photos, tmp_path), photos)
    whole = killed_at // 4 * 4  # images in whole parts are not decoded again
    assert {i for i in photos.reads if i > 1} == set(range(max(2, whole), len(SHAPES)))


def test_killed_at_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, photos = os.replace, Photos()
    for kill in range(7):
        for when in ("before", "after"):
            calls = iter(range(100))

            def killed(source: Any, target: Any, kill: int = kill, when: str = when, calls: Any = calls) -> None:
                dies = next(calls) == kill
                if not (dies and when == "before"):
                    replace(source, target)
                if dies:
                    raise KeyboardInterrupt

            directory = tmp_path / f"{kill} {when}"
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", killed)
                with pytest.raises(KeyboardInterrupt):
                    make(photos, directory)
            check(make(photos, directory), photos)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = (30 * 40 + 25 * 20) * 3 / 2 * len(SHAPES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(needed)))
    with pytest.raises(InputError, match=r"^cache: .* needs about 0\.0 GB and its disk has 0\.0 GB free"):
        make(Photos(), tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(needed * 1.05)))
    make(Photos(), tmp_path)


def test_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"^cache: the disk of .* is full; set `cache` to none$"):
        make(Photos(), tmp_path)
    assert [file.name for file in tmp_path.glob("*/*")] == ["lock"]  # what was written makes room again


def damage_index(place: Path) -> None:
    index = bytearray((place / "part-00001.index").read_bytes())
    index[8] ^= 1
    (place / "part-00001.index").write_bytes(index)


def change(**values: Any) -> Any:
    def write(place: Path) -> None:
        complete = json.loads((place / "complete.json").read_text())
        (place / "complete.json").write_text(json.dumps(complete | values))

    return write


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda place: (place / "part-00001.bin").unlink(), "No such file"),
        (lambda place: (place / "part-00001.bin").write_bytes(b"x"), "has 1 bytes of"),
        (damage_index, "its index was altered"),
        (lambda place: (place / "part-00002.index").unlink(), "No such file"),
        (lambda place: (place / "complete.json").write_text("{"), "delete it"),
        (lambda place: (place / "complete.json").write_text(json.dumps({})), "delete it"),
        (lambda place: (place / "complete.json").write_text("[]"), "delete it"),
        (change(part_images=0), "delete it"),
        (change(part_bytes=[1, "x"]), "delete it"),
        (lambda place: (place / "complete.json").write_text("[" * 10**6), "nested deeper than 100 levels"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: Any, reason: str) -> None:
    images = make(Photos(), tmp_path)
    assert isinstance(images, CachedImages)
    damage(images.directory)
    with pytest.raises(InputError, match=rf"^cache: .* is damaged \(.*{reason}"):
        make(Photos(), tmp_path)


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    class Gone(Photos):
        def read(self, i: int) -> Any:
            raise FileNotFoundError(2, "No such file or directory")

    with pytest.raises(InputError, match=r"can no longer be read: .*No such file or directory"):
        make(Gone(), tmp_path)


@pytest.mark.parametrize(
    ("cache", "resize_to", "message"),
    [
        ("big", None, "cache: 'big' is not allowed; it must be none, decoded or resized"),
        ("resized", None, "resize_to: None is not allowed with `cache` resized; it must be at least 1"),
        ("resized", 0, "resize_to: 0 is not allowed"),
    ],
)
def test_bad_settings(tmp_path: Path, cache: Any, resize_to: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(Photos(), tmp_path, cache, resize_to)


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^cache: .* cannot be made: Not a directory$"):
        make(Photos(), tmp_path / "file")
