"""Images in memory and in folders: read as they lie, refused with a reason."""

import json
import os
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stacey_dist.data.images import ArrayImages, BrokenImageError, listing, open_images, read_pixels
from stacey_dist.data.images.folder import folder_images
from stacey_dist.data.images.image_set import read_file, sampled
from stacey_dist.errors import InputError
from tests.data.images.helpers import encoded, image_tree, numbered, picture, same


def test_arrays() -> None:
    images = same(numbered(300))
    assert images.read(257)[0, 0].tolist() == [1, 1, 0]  # type: ignore[index]
    assert images.name(4) == "image 4"
    changed = numbered(300)
    changed.pixels[299, 7, 7, 2] = 1
    others = [changed, numbered(299), ArrayImages(numbered(300).pixels, images.labels[::-1], images.classes)]
    assert len({images.identity, *(other.identity for other in others)}) == 4


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), "shape"),
        (np.zeros((2, 8, 8, 3)), np.zeros(2, int), "float64"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3, int), "2 images need as many labels"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 3]), "from 0 to 2, got 0 to 3"),
    ],
)
def test_bad_arrays(pixels: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArrayImages(pixels, labels, ["a", "b", "c"])


@pytest.mark.parametrize("split", ["val", "validation", "test"])
def test_folder(tmp_path: Path, split: str) -> None:
    image_tree(tmp_path, ("train", split))
    (tmp_path / "train/n01/x.PNG").write_bytes(encoded(picture(seed=99), "PNG"))
    for name in ("notes.txt", ".hidden.jpg"):
        (tmp_path / "train/n01" / name).write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/list.csv").touch()
    train, validation = open_images(str(tmp_path))
    assert train.classes == validation.classes == ["n01", "n02"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert train.labels.dtype == np.int64
    names = ["n01/n01_0.JPEG", "n01/n01_1.JPEG", "n01/x.PNG", "n02/n02_0.JPEG", "n02/n02_1.JPEG"]
    assert [train.name(i) for i in range(5)] == [str(tmp_path / "train" / name) for name in names]
    assert train.read(4) == (tmp_path / "train/n02/n02_1.JPEG").read_bytes()
    assert np.array_equal(read_pixels(train, 2), picture(seed=99))
    same(train)
    assert len(validation) == 4


def test_folder_names_of_any_kind(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("Köter [1]", "a b"):
            (tmp_path / split / name).mkdir(parents=True)
            for file in (b"b\xff.jpg", "ü x.Jpg".encode()):
                Path(os.fsdecode(bytes(tmp_path / split / name) + b"/" + file)).write_bytes(encoded(picture()))
    train, _ = open_images(str(tmp_path))
    assert train.classes == ["Köter [1]", "a b"]
    assert all(train.read(i) for i in range(4))
    assert train.name(1).endswith("ü x.Jpg")


def test_folder_identity(tmp_path: Path) -> None:
    first = folder_images(image_tree(tmp_path / "one"))[0].identity
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert folder_images(tmp_path / "two")[0].identity == first
    file = tmp_path / "two/train/n02/n02_1.JPEG"
    content = file.read_bytes()
    file.write_bytes(content[:-3] + b"\0\xff\xd9")  # of the same length
    assert folder_images(tmp_path / "two")[0].identity != first
    file.write_bytes(content)
    assert folder_images(tmp_path / "two")[0].identity == first
    file.rename(file.with_name("other.JPEG"))
    assert folder_images(tmp_path / "two")[0].identity != first


def test_a_class_may_have_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    image_tree(tmp_path / "one")
    for split in ("train", "val"):
        os.rename(tmp_path / "one" / split / "n02", bytes(tmp_path / "one" / split / "n0") + b"\xff")
    assert len(folder_images(tmp_path / "one")[0].identity) == 64


def test_identity_of_many_files_knows_sizes(tmp_path: Path) -> None:
    train, _ = folder_images(image_tree(tmp_path, per_class=200))
    unread = (set(range(400)) - set(sampled(400))).pop()
    file = Path(train.name(unread))
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    assert folder_images(tmp_path)[0].identity != train.identity
    file.write_bytes(content)
    assert folder_images(tmp_path)[0].identity == train.identity


def test_folder_keeps_no_string_an_image(tmp_path: Path) -> None:
    train, _ = folder_images(image_tree(tmp_path, per_class=50))
    assert len(pickle.dumps(train)) < 4000


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class folders that were read."""
    found: list[str] = []
    images = listing._images
    monkeypatch.setattr(listing, "_images", lambda folder: found.append(folder.name) or images(folder))
    return found


def settle(root: Path) -> None:
    """Make the folders look as if they had changed long ago."""
    for folder in root.rglob("*"):
        if folder.is_dir():
            os.utime(folder, (10**9, 10**9))


def test_folders_are_listed_once(tmp_path: Path, listed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    root, cache = image_tree(tmp_path / "data", per_class=5), tmp_path / "cache"
    (root / "train/n01/notes.txt").touch()
    expected = folder_images(root)
    settle(root)
    for times in (4, 0, 0):
        listed.clear()
        said = capsys.readouterr().err
        found = folder_images(root, cache)
        assert len(listed) == times
        assert "left out 'n01/notes.txt'" in said
        for images, other in zip(found, expected, strict=True):
            assert [images.name(i) for i in range(len(images))] == [other.name(i) for i in range(len(other))]
            assert images.identity == other.identity
            assert np.array_equal(images.labels, other.labels)
    assert capsys.readouterr().err == said
    os.unlink(root / "train/n02/n02_1.JPEG")
    for _ in range(2):  # what has changed just now may change again
        listed.clear()
        train, _ = folder_images(root, cache)
        assert listed == ["n02"]
        assert train.identity == folder_images(root)[0].identity != expected[0].identity
    for file in (cache / "listings").iterdir():
        file.write_bytes(b"damaged")
    assert folder_images(root, cache)[0].identity == train.identity
    for file in (cache / "listings").glob("*.json"):
        for classes in ([], {"n01": [0, 1]}, {"n01": [0, 1, "2", []]}):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": classes}))
            assert folder_images(root, cache)[0].identity == train.identity


def test_rows_that_no_run_can_still_map_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = image_tree(tmp_path / "data", per_class=5), tmp_path / "cache"
    settle(root)

    def rows() -> set[str]:
        return {file.name for file in (cache / "listings").glob("*.rows")}

    def change(name: str, days_ago: float) -> set[str]:
        """Return which rows are there after a folder has changed, the present ones being of so long ago."""
        for file in (cache / "listings").glob("*.rows"):
            os.utime(file, (time.time() - days_ago * 86400,) * 2)
        os.unlink(root / f"train/n01/n01_{name}.JPEG")
        folder_images(root, cache)
        return rows()

    folder_images(root, cache)
    first = rows()
    second = change("1", days_ago=80)
    assert second > first  # a run may have the first ones mapped
    third = change("2", days_ago=100)
    (held_out,) = first & third
    (training,) = third - first - second
    assert third == {held_out, training}
    settle(root)
    folder_images(root, cache)
    for name in third:
        os.utime(cache / "listings" / name, (10**9, 10**9))
    folder_images(root, cache)  # lists nothing, and maps them
    assert all(time.time() - (cache / "listings" / name).stat().st_mtime < 60 for name in third)


@pytest.mark.parametrize("per_class", [2, 100])
def test_other_processes_get_no_names(tmp_path: Path, per_class: int) -> None:
    root, cache = image_tree(tmp_path / "data", per_class=per_class), tmp_path / "cache"
    train, _ = folder_images(root, cache)
    pickled = pickle.dumps(train)
    assert len(pickled) < 500
    same(train)
    shutil.rmtree(cache)
    with pytest.raises(InputError, match=r"^cache_dir: .*\.rows cannot be read: .*all hosts have to reach it"):
        pickle.loads(pickled)


def remove(path: str) -> Any:
    return lambda root: shutil.rmtree(root / path)


def empty(path: str) -> Any:
    return lambda root: [file.unlink() for file in (root / path).iterdir()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("val/n02"), r"^path: .*/val has no folder for class 'n02'"),
        (remove("train/n01"), r"^path: .*/val has a folder 'n01', which is none of the training classes"),
        (empty("train/n02"), r"^path: .*/train/n02 has no images; they are files whose names end in \.jpeg"),
        (empty("val/n01"), r"^path: .*/val/n01 has no images"),
        (remove("val"), r"^path: .* has train and none of val, validation, test beside it"),
        (lambda root: [shutil.rmtree(f) for f in (root / "train").iterdir()], r"train has no class folders"),
        (lambda root: (root / "train/n01/a.jpg").symlink_to("gone"), r"n01/a\.jpg cannot be read: No such file"),
    ],
)
def test_bad_folders(tmp_path: Path, change: Any, message: str) -> None:
    image_tree(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        open_images(str(tmp_path))


def test_file_that_goes_is_an_error_of_its_own(tmp_path: Path) -> None:
    train, _ = folder_images(image_tree(tmp_path))
    os.unlink(train.name(0))
    with pytest.raises(FileNotFoundError, match="n01_0"):
        train.read(0)


LEFT_OUT = "@eaDir", "__MACOSX", ".thumbnails", ".ipynb_checkpoints", "lost+found", "#recycle"


def test_folders_that_are_no_classes_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_tree(tmp_path)
    for name in LEFT_OUT:
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / name / "a.jpg").write_bytes(encoded(picture()))
    train, validation = open_images(str(tmp_path))
    assert train.classes == validation.classes == ["n01", "n02"]
    (line,) = capsys.readouterr().err.splitlines()  # none of validation, where there are no others
    assert line == f"data: {tmp_path}/train: left out '#recycle' and 5 more: no class folder, or no image file"


def test_what_is_no_image_file_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_tree(tmp_path)
    expected = len(open_images(str(tmp_path))[0])
    place = tmp_path / "train/n01"
    (place / "folder.jpg").mkdir()
    (place / "folder.jpg/inside.jpg").write_bytes(encoded(picture()))
    os.mkfifo(place / "pipe.png")
    (place / "device.jpg").symlink_to("/dev/zero")
    (place / "link to a pipe.jpg").symlink_to("pipe.png")
    (place / "link to a folder.jpg").symlink_to(tmp_path)
    for name in ("Thumbs.db", "without an extension", ".DS_Store"):
        (place / name).write_bytes(encoded(picture()))
    (place / "linked.jpg").symlink_to(tmp_path / "train/n02/n02_0.JPEG")
    train, _ = open_images(str(tmp_path))
    assert len(train) == expected + 1
    assert train.identity
    assert all(len(read_pixels(train, i)) == 60 for i in range(len(train)))
    assert capsys.readouterr().err.splitlines() == [
        f"data: {tmp_path}/train: left out 'n01/.DS_Store' and 7 more: no class folder, or no image file"
    ]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_takes_the_place_of_a_file_is_a_broken_image(tmp_path: Path, make: Any) -> None:
    train, _ = folder_images(image_tree(tmp_path))
    os.unlink(train.name(2))
    make(train.name(2))
    with pytest.raises(BrokenImageError, match=r"^no regular file$"):
        train.read(2)
    assert train.identity


def test_a_file_too_large_for_an_image(tmp_path: Path) -> None:
    train, _ = folder_images(image_tree(tmp_path))
    os.truncate(train.name(1), 2**30 + 1)
    with pytest.raises(BrokenImageError, match="1,073,741,825 bytes are too many for an image"):
        train.read(1)
    assert train.identity


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 1000)
    tracemalloc.start()
    assert len(read_file(str(tmp_path / "a.jpg"))) == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
