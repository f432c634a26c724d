"""Parquet and the Hub: read as they lie, refused with a reason."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from stacey_dist.data import lock
from stacey_dist.data.images import BrokenImageError, cached, decode, open_images, read_pixels, tables
from stacey_dist.data.images.image_set import sampled
from stacey_dist.data.images.tables import parquet_images
from stacey_dist.data.lock import locked, locked_directory
from stacey_dist.errors import InputError
from tests.data.images.helpers import encoded, picture, same


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


FEATURES = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog"])})


def rows(count: int, seed: int = 0) -> dict[str, list[Any]]:
    files = [{"bytes": encoded(picture(8, 9, seed + i)), "path": f"{i}.jpg"} for i in range(count)]
    return {"img": files, "label": [i % 2 for i in range(count)]}


def write(path: Path, columns: dict[str, list[Any]], features: Features | None = FEATURES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if features is None:
        pq.write_table(pa.table(columns), path)
    else:
        Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def test_parquet(tmp_path: Path) -> None:
    for part in range(2):
        write(tmp_path / f"data/train-0000{part}-of-00002.parquet", rows(5, 10 * part))
    write(tmp_path / "data/validation-00000-of-00001.parquet", rows(2, 50))
    write(tmp_path / "data/test-00000-of-00001.parquet", rows(3) | {"label": [-1, -1, -1]})
    train, validation = open_images(str(tmp_path), cache_dir=str(tmp_path / "arrow"))
    assert (len(train), len(validation)) == (10, 2)
    assert train.classes == validation.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 1, 0, 1, 0] * 2
    for i in range(10):
        assert train.read(i) == encoded(picture(8, 9, i % 5 + 10 * (i // 5)))
    assert train.name(7) == f"{tmp_path}/data, train, row 7"
    same(train)
    assert len(pickle.dumps(train)) < 6000
    shutil.move(tmp_path / "data", tmp_path / "moved/data")
    again, _ = open_images(str(tmp_path / "moved"), cache_dir=str(tmp_path / "arrow2"))
    assert again.identity == train.identity != validation.identity


def test_hub(tmp_path: Path) -> None:
    """A local directory stands in for a name of the Hub."""
    write(tmp_path / "set/train.parquet", rows(4))
    write(tmp_path / "set/test.parquet", rows(2, 50))
    settings: dict[str, Any] = dict(dataset=str(tmp_path / "set"), cache_dir=str(tmp_path / "arrow"))
    train, validation = open_images(**settings, validation_split="test")
    assert (len(train), len(validation)) == (4, 2)
    assert train.read(1) == encoded(picture(8, 9, 1))
    with pytest.raises(InputError, match=r"^dataset: .*, split nowhere: cannot be loaded: .*nowhere[^\n]*$"):
        open_images(**settings, validation_split="nowhere")
    with pytest.raises(
        InputError, match=r"^validation_split: 'train\[:1\]' has images of the split for training, 'train'"
    ):
        open_images(**settings, validation_split="train[:1]")
    part, _ = open_images(**settings, split="train[1:3]", validation_split="test")
    assert [part.read(i) for i in range(2)] == [encoded(picture(8, 9, i)) for i in (1, 2)]


def parquet(tmp_path: Path, train: Path, validation: Path | None = None, **columns: str | None) -> Any:
    settings: dict[str, Any] = dict(image_column=None, label_column=None) | columns
    return parquet_images([train], [validation or train], **settings, cache_dir=str(tmp_path / "arrow"))


def test_all_files_are_converted_under_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / f"{name}.parquet", rows(4)) for name in "abc"]
    locks = []

    def locked(*arguments: Any, **settings: Any) -> Any:
        locks.append(arguments)
        return locked_directory(*arguments, **settings)

    monkeypatch.setattr(tables, "locked_directory", locked)
    for number in (1, 1):  # a process that waits says so once
        train, _ = parquet_images(files, files, image_column=None, label_column=None, cache_dir=str(tmp_path / "arrow"))
        assert (len(train), len(locks)) == (12, number)


def test_undeclared_columns(tmp_path: Path) -> None:
    plain = [encoded(picture(8, 9, i)) for i in range(4)]
    train = write(tmp_path / "a.parquet", {"image": plain, "labels": [0, 2, 1, 0]}, None)
    validation = write(tmp_path / "b.parquet", {"image": plain[:2], "labels": [3, 1]}, None)
    first, second = parquet(tmp_path, train, validation)
    assert first.classes == second.classes == ["0", "1", "2", "3"]
    assert [first.read(i) for i in range(4)] == plain
    same(first)


def test_columns_are_found_or_chosen(tmp_path: Path) -> None:
    names = ["a", "b"]
    columns = rows(2)
    columns = {"photo": columns["img"], "coarse": [0, 1], "fine_label": [1, 0], "id": [5, 6]}
    features = Features(
        {
            "photo": Image(),
            "coarse": ClassLabel(names=names),
            "fine_label": ClassLabel(names=names),
            "id": Value("int64"),
        }
    )
    file = write(tmp_path / "a.parquet", columns, features)
    assert parquet(tmp_path, file)[0].labels.tolist() == [1, 0]
    assert parquet(tmp_path, file, label_column="coarse")[0].labels.tolist() == [0, 1]
    with pytest.raises(InputError, match=r"^label_column: 'nope' is no column of labels; .*photo.*id \(int64\)"):
        parquet(tmp_path, file, label_column="nope")
    with pytest.raises(InputError, match=r"^image_column: 'id' is no column of images; .*, train has photo"):
        parquet(tmp_path, file, image_column="id")
    with pytest.raises(InputError, match=r"^label_column: must be set; "):
        parquet(tmp_path, write(tmp_path / "b.parquet", {"image": [b"x"], "number": [0]}, None))
    with pytest.raises(InputError, match=r"^image_column: must be set; "):
        parquet(tmp_path, write(tmp_path / "c.parquet", {"x": [b"x"], "y": [b"x"], "label": [0]}, None))


def test_bad_labels(tmp_path: Path) -> None:
    good = write(tmp_path / "a.parquet", rows(3))
    hidden = write(tmp_path / "b.parquet", rows(3) | {"label": [0, -1, -1]})
    with pytest.raises(InputError, match=r"^/.*, validation: column 'label' is -1 in row 1: it has no labels, as"):
        parquet(tmp_path, good, hidden)
    missing = write(tmp_path / "c.parquet", {"image": [b"x", b"y"], "label": [1, None]}, None)
    with pytest.raises(InputError, match=r"train: column 'label' has 1 rows without a label"):
        parquet(tmp_path, missing)
    other = Features({"img": Image(), "label": ClassLabel(names=["cat", "cow"])})
    write(tmp_path / "d/train.parquet", rows(2))
    write(tmp_path / "d/val.parquet", rows(2), other)
    with pytest.raises(InputError, match=r"2 classes for training and 2 for validation must be the same, and 'cow' is"):
        open_images(str(tmp_path / "d"), cache_dir=str(tmp_path / "arrow"))


def test_rows_without_bytes(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.png"
    file.write_bytes(encoded(picture(), "PNG"))
    columns = {"img": [{"bytes": None, "path": str(file)}, {"bytes": None, "path": None}], "label": [0, 1]}
    train, _ = parquet(tmp_path, write(tmp_path / "a.parquet", columns, None))
    assert np.array_equal(read_pixels(train, 0), picture())
    with pytest.raises(BrokenImageError, match="neither bytes nor a path"):
        train.read(1)
    before = train.identity
    file.write_bytes(encoded(picture()[::-1], "PNG"))
    again, _ = parquet(tmp_path, tmp_path / "a.parquet")
    assert again.identity != before  # a cache of decoded images must not be taken for that of others


def test_damaged_parquet(tmp_path: Path) -> None:
    write(tmp_path / "val.parquet", rows(2))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"^path: .*/train\.parquet cannot be read: ArrowInvalid: [^\n]+$"):
        open_images(str(tmp_path), cache_dir=str(tmp_path / "arrow"))


def test_parquet_without_validation(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", rows(2))
    with pytest.raises(InputError, match=r"has train\*\.parquet and neither val\*\.parquet nor test\*\.parquet"):
        open_images(str(tmp_path))


def test_converted_files_that_are_damaged_are_made_again(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", rows(40))
    labels = parquet(tmp_path, file)[0].labels.tolist()
    (arrow,) = tmp_path.glob("**/*.arrow")
    content = arrow.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-8]):
        arrow.write_bytes(damaged)
        assert parquet(tmp_path, file)[0].labels.tolist() == labels


def test_a_cache_is_not_that_of_other_images_of_the_same_labels(tmp_path: Path) -> None:
    content = rows(600)
    broken = [{**image, "bytes": b"broken"} if i == 301 else image for i, image in enumerate(content["img"])]
    found = []
    for name, images in (("a", broken), ("b", content["img"])):
        table = parquet(tmp_path, write(tmp_path / f"{name}.parquet", {**content, "img": images}))[0]
        assert 301 not in sampled(600)
        found.append((table.identity, cached(table, "decoded", tmp_path / "cache", progress=False)))
    assert found[0][0] == found[1][0]  # as 0.1.0 has it: some of the images are looked into
    with pytest.raises(BrokenImageError):
        found[0][1].read(301)
    assert found[1][1].read(301).shape == decode(content["img"][301]["bytes"]).shape


def test_large_images_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow makes no batch of 2 GiB of images."""
    counts, iter_batches = [], pq.ParquetFile.iter_batches

    def counting(self: Any, rows: int, **options: Any) -> Any:
        counts.append(rows)
        return iter_batches(self, rows, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    write(tmp_path / "a/train-0.parquet", rows(40))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "validation.parquet", rows(2, 50))
    found = []
    for name in ("a", "b"):
        shutil.copy(tmp_path / "validation.parquet", tmp_path / name / "validation-0.parquet")
        found.append(open_images(str(tmp_path / name), cache_dir=str(tmp_path / f"cache {name}"))[0])
        monkeypatch.setattr(tables, "_BATCH_BYTES", 4096)
    assert counts[0] == 1024
    assert 0 < counts[-1] < 20
    assert len(found[0]) == len(found[1]) == 40
    assert all(found[0].read(i) == found[1].read(i) for i in range(40))


def test_another_users_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock can be opened for reading alone."""
    with locked_directory(tmp_path, "cache_dir", "make room"):
        pass

    def of_another_user(path: Any, mode: str) -> Any:
        if mode != "rb":
            raise PermissionError(13, "Permission denied", str(path))
        return path.open("rb")

    monkeypatch.setattr(lock, "open", of_another_user, raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with locked_directory(tmp_path, "cache_dir", "make room"):
        with locked(tmp_path / "lock", wait=None):  # who only read share it
            pass
        monkeypatch.undo()
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=None):
            pass
    monkeypatch.setattr(lock, "open", of_another_user, raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(PermissionError), locked(tmp_path / "no lock"):
        pass
