"""Importers on files that somebody has made to do harm: what they name is not called, and what is amiss is said."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stacey_dist.checkpoint import read_tensors
from stacey_dist.checkpoint.importers import ForeignCheckpointError, distributed, import_checkpoint, torch_file
from stacey_dist.cli import main
from stacey_dist.safe_pickle import unpickle
from tests.checkpoint.foreign import MAKERS, make_fsdp2, make_zero1, save_distributed, tensors


class Runs:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def is_right(path):
    weights, states = tensors()
    there = read_tensors(path)
    expected = {f"model/{name}": w for name, w in weights.items()}
    expected |= {f"optimizer/{name}/{key}": t for name, state in states.items() for key, t in state.items()}
    return there.keys() == expected.keys() and all(
        torch.equal(there[name], tensor) and there[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


@pytest.mark.parametrize("maker", MAKERS)
def test_what_others_saved_is_imported_to_the_bit(tmp_path, maker):
    MAKERS[maker](tmp_path / "saved")
    assert is_right(import_checkpoint(tmp_path / "saved", tmp_path / "step_00000003"))


def refused(tmp_path, capsys, source, message):
    """Assert that the import ends with one line, and leaves nothing."""
    assert main(["checkpoint", "import", str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(source) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def metadata_of(directory):
    return pickle.loads((directory / ".metadata").read_bytes())


def test_entries_that_are_no_tensors_are_never_unpickled(tmp_path):
    marker = tmp_path / "marker"
    for name, part in (("pytorch_model_fsdp_0", "model"), ("optimizer_0", "optimizer")):
        weights, states = tensors()
        content = weights if part == "model" else {"state": states}
        save_distributed(tmp_path / "saved" / name, {part: content | {"extra": Runs(marker)}})
    assert is_right(import_checkpoint(tmp_path / "saved", tmp_path / "step_00000003"))
    assert not marker.exists()


def code(marker):
    """Return a file that torch.load runs, unless it is told not to."""
    opened = io.BytesIO()
    torch.save(Runs(marker), opened)
    return opened.getvalue()


def tensor_entry(shape=(2,), dtype=torch.float32):
    chunks = [ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)


class OtherText(str):
    """A name that is text and more."""

    def __reduce__(self):
        return OtherText, (str(self),)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((7, "7"), "there is a int where a name belongs"),
        ((("a", "b"), "a.b"), "a key that is a tuple"),
        ((None, "None"), "there is a NoneType where a name belongs"),
        ((b"a", "a"), "there is a bytes where a name belongs"),
        ((OtherText("a"), "b"), "OtherText has no place in it"),
        (("a", "b"), "a: no location is given for a piece of it"),
    ],
    ids=str,
)
def test_two_ways_to_read_one_name(tmp_path, capsys, names, message):
    marker = tmp_path / "marker"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        directory = tmp_path / "saved" / name
        directory.mkdir(parents=True)
        content = code(marker)
        (directory / "__0_0.distcp").write_bytes(content)
        metadata = Metadata(
            state_dict_metadata={names[0]: tensor_entry((1,)), names[1]: BytesStorageMetadata()},
            storage_data={MetadataIndex(names[1]): _StorageInfo("__0_0.distcp", 0, len(content))},
            planner_data={str(names[0]): (names[0],)},
        )
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(tmp_path, capsys, tmp_path / "saved", message)
    assert not marker.exists()


def place(metadata, **changes):
    """Change where the first piece of a tensor is said to be."""
    info = next(info for index, info in metadata.storage_data.items() if index.offset is not None)
    vars(info).update(changes)


def test_code_in_the_place_of_a_tensor_is_not_run(tmp_path, capsys):
    make_fsdp2(tmp_path / "saved")
    directory, marker = tmp_path / "saved" / "optimizer_0", tmp_path / "marker"
    metadata, content = metadata_of(directory), code(marker)
    (directory / "more.distcp").write_bytes(content)
    place(metadata, relative_path="more.distcp", offset=0, length=len(content))
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(tmp_path, capsys, tmp_path / "saved", "has no place in it")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relative_path": "../pytorch_model_fsdp_0/__0_0.distcp"}, "is not the name of a file in the directory"),
        ({"relative_path": "/etc/passwd"}, "is not the name of a file in the directory"),
        ({"relative_path": ".."}, "is not the name of a file in the directory"),
        ({"relative_path": ["__0_0.distcp"]}, "is not the name of a file in the directory"),
        ({"relative_path": "nothing"}, "No such file"),
        ({"relative_path": "link"}, "it is a symbolic link"),
        ({"relative_path": "pipe"}, "it is a pipe, where a regular file belongs"),
        ({"relative_path": "folder"}, "it is a directory, where a regular file belongs"),
        ({"offset": -1}, "no location is given for a piece of it"),
        ({"offset": True}, "no location is given for a piece of it"),
        ({"offset": 10**30}, "no location is given for a piece of it"),
        ({"length": 2**62}, "have the same bytes"),
        ({"length": 0}, "it is larger than its pieces"),
        ({"offset": 3}, "__0_0.distcp: two pieces have the same bytes"),
        ({"transform_descriptors": ["stream.zstd"]}, "it is compressed or encrypted"),
    ],
    ids=str,
)
def test_pieces_that_are_somewhere_else(tmp_path, capsys, change, message):
    make_fsdp2(tmp_path / "saved")
    directory = tmp_path / "saved" / "pytorch_model_fsdp_0"
    (directory / "link").symlink_to(directory / "__0_0.distcp")
    os.mkfifo(directory / "pipe")
    (directory / "folder").mkdir()
    metadata = metadata_of(directory)
    # The second, so that it has a neighbour on both sides.
    info = sorted(metadata.storage_data.values(), key=lambda info: info.offset)[1]
    vars(info).update(change)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(tmp_path, capsys, tmp_path / "saved", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.state_dict_metadata.clear(), "there is no optimizer state with a step in it"),
        (lambda m: vars(m).update(state_dict_metadata=[]), "there is a list where a dictionary belongs"),
        (lambda m: vars(m).update(storage_data=None), "there is a NoneType where a dictionary belongs"),
        (lambda m: m.storage_data.clear(), "no location is given for a piece of it"),
        (lambda m: m.state_dict_metadata.update(x=7), "there is a int where a TensorStorageMetadata belongs"),
        (lambda m: m.state_dict_metadata.update(x=tensor_entry((10**15,))), "no location is given for a piece of it"),
        (lambda m: first(m).chunks.clear(), "it is larger than its pieces"),
        (lambda m: first(m).chunks.append(first(m).chunks[0]), "two pieces have the same bytes"),
        (lambda m: setattr(first(m), "size", torch.Size((10**9, 10**9))), "it is larger than its pieces"),
        (lambda m: setattr(first(m), "size", torch.Size((1, 1))), "a piece is not within it"),
        (lambda m: setattr(first(m), "size", (-1, -1)), "there is something else where a shape belongs"),
        (lambda m: setattr(first(m).properties, "dtype", torch.float16), "does not hold a piece of it"),
        (lambda m: setattr(first(m).properties, "dtype", "float32"), "a tensor has no dtype or no pieces"),
    ],
)
def test_metadata_that_do_not_fit(tmp_path, capsys, change, message):
    make_fsdp2(tmp_path / "saved")
    directory = tmp_path / "saved" / "optimizer_0"
    metadata = metadata_of(directory)
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(tmp_path, capsys, tmp_path / "saved", message)


def first(metadata):
    return next(entry for entry in metadata.state_dict_metadata.values() if isinstance(entry, TensorStorageMetadata))


def test_two_tensors_that_would_have_one_name(tmp_path, capsys):
    weights, states = tensors()
    save_distributed(tmp_path / "saved" / "pytorch_model_fsdp_0", {"model": weights, "a.bias": torch.zeros(4)})
    save_distributed(tmp_path / "saved" / "optimizer_0", {"optimizer": {"state": states}})
    assert main(["checkpoint", "import", str(tmp_path / "saved"), str(tmp_path / "out")]) == 1
    assert "would have one name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tag", ["../elsewhere", "/", "..", "a\0b", "\ud800".encode("utf-8", "surrogatepass")], ids=ascii
)
def test_latest_names_a_directory_beside_it(tmp_path, capsys, tag):
    make_zero1(tmp_path / "elsewhere")
    (tmp_path / "saved").mkdir()
    (tmp_path / "elsewhere" / "step3").rename(tmp_path / "saved" / "x")
    latest = tmp_path / "saved" / "latest"
    latest.write_bytes(tag) if isinstance(tag, bytes) else latest.write_text(tag)
    refused(tmp_path, capsys, tmp_path / "saved", "")


@pytest.mark.parametrize(
    "name", ["step3/mp_rank_00_model_states.pt", "step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link to a pipe"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, capsys, name, kind):
    make_zero1(tmp_path / "saved")
    file = tmp_path / "saved" / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "directory":
        file.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        file.symlink_to(tmp_path / "pipe")
    refused(tmp_path, capsys, tmp_path / "saved", "where a regular file belongs")


def archive(pickled, storages=(), compression=zipfile.ZIP_STORED):
    opened = io.BytesIO()
    with zipfile.ZipFile(opened, "w", compression) as written:
        written.writestr("x/data.pkl", pickled)
        for key, content in storages:
            written.writestr(f"x/data/{key}", content)
    return opened


def rebuilt(size, stride, offset=0, dtype="FloatStorage", count=8, function=b"ctorch._utils\n_rebuild_tensor_v2\n"):
    """Return a pickle of one tensor."""

    def plain(value):
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + plain("storage") + f"ctorch\n{dtype}\n".encode() + plain("0") + plain("cpu") + plain(count) + b"tQ"
    rest = plain(offset) + plain(size) + plain(stride) + b"\x89N"
    return b"\x80\x02" + function + b"(" + storage + rest + b"tR."


def test_a_tensor_lies_within_its_storage():
    content = struct.pack("<8f", *range(8))

    def load(*arguments, **options):
        return torch_file.load(archive(rebuilt(*arguments, **options), [("0", content)]))

    assert load((2, 3), (1, 2), offset=2).tolist() == [[2, 4, 6], [3, 5, 7]]
    assert load((0, 10**9), (1, 1)).shape == (0, 10**9)
    for wrong in [
        ((9,), (1,)),
        ((2, 3), (1, 2), 3),
        ((2,), (2**62,)),
        ((2, 2), (1, 1)),  # two elements in one place
        ((10**12,), (0,)),
        ((-1,), (1,)),
        ((2,), (-1,)),
        ((2,), (1, 1)),
        ((2,), (1,), -1),
        ((2,), (1,), 2**64),
        ("ab", (1, 1)),
    ]:
        with pytest.raises(ValueError, match="tensor"):
            load(*wrong)
    for options in ({"count": 9}, {"count": 2**62}, {"dtype": "DoubleStorage"}, {"count": -1}):
        with pytest.raises(ValueError, match="storage"):
            load((2,), (1,), **options)


def test_an_archive_is_as_large_as_it_says():
    content = bytes(10**6)
    packed = archive(rebuilt((2,), (1,), count=250_000), [("0", content)], zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="it is compressed"):
        torch_file.load(packed)
    damaged = bytearray(archive(rebuilt((2,), (1,)), [("0", bytes(32))]).getvalue())
    damaged[damaged.index(bytes(32)) + 5] ^= 1
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        torch_file.load(io.BytesIO(damaged))


# A tuple that holds another twice, sixty times over: its hash takes longer than the universe has lasted.
DOUBLED = b")" + b"q\x00h\x00\x86" * 60

HARM = {
    "a key that is never hashed": b"}" + DOUBLED + b"K\x01s.",
    "keys that are never hashed": b"}(" + DOUBLED + b"K\x01u.",
    "a dictionary with a key that is never hashed": b"(" + DOUBLED + b"K\x01d.",
    "a set that is never made": b"\x80\x04\x8f(" + DOUBLED + b"\x90.",
    "a frozen set that is never made": b"\x80\x04(" + DOUBLED + b"\x91.",
    "a key as deep as the stack": b"}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
    "a function": b"cos\nsystem\n(X\x04\x00\x00\x00true" + b"tR.",
    "a function, as a stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "a class, as an instance": b"(X\x01\x00\x00\x00xios\nsystem\n.",
    "getattr": b"cbuiltins\ngetattr\n.",
    "a part of what is known": b"\x80\x04\x8c\x05torch\x8c\x0dfloat32.__new__\x93.",
    "a number for a class": b"\x82\x01.",
    "an attribute of a function": b"ccollections\nOrderedDict\n(N}X\x01\x00\x00\x00xK\x01stb.",
    "the state of a function": b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00xK\x01sb.",
    "an attribute of a class": b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    b"(N}X\x0c\x00\x00\x00__setstate__K\x01stb.",
    "an item of a dtype": b"ctorch\nfloat32\nK\x01K\x02s.",
    "the state of a dtype": b"ctorch\nfloat32\n}X\x01\x00\x00\x00xK\x01sb.",
    "a persistent id": b"K\x01Q.",
    "a place for four billion objects": b"K\x01r\xff\xff\xff\xff0h\x00.",
    "a text longer than the file": b"\x8d" + (2**62).to_bytes(8, "little") + b"x.",
    "a number longer than the file": b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",
    "nothing": b"",
    "no end": b"(((((",
}


@pytest.mark.parametrize("name", HARM)
def test_a_pickle_has_nothing_called_or_changed(name):
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "system", ran.append)
        with pytest.raises(Exception, match=r".*") as caught:
            unpickle(HARM[name], distributed._KNOWN)
    assert not isinstance(caught.value, (AssertionError, MemoryError))
    assert ran == []


def test_a_tensor_cannot_be_changed_by_the_pickle_that_holds_it():
    body = rebuilt((2,), (1,))[:-1]
    for change in (b"(K\x01K\x02K\x03K\x04tb.", b"K\x00K\x01s.", b"(K\x00K\x01u."):
        with pytest.raises(pickle.UnpicklingError, match="it has an instruction for a Tensor"):
            torch_file.load(archive(body + change, [("0", bytes(32))]))


def test_one_tensor_named_many_times_is_not_copied_many_times(tmp_path):
    source = tmp_path / "saved"
    source.mkdir()
    one = torch.zeros(10_000)
    torch.save({f"w{i}": one for i in range(100)}, source / "pytorch_model_fsdp.bin")
    torch.save({"state": {"w0": {"step": torch.tensor(1.0)}}}, source / "optimizer.bin")
    with pytest.raises(ForeignCheckpointError, match="its tensors are larger than its files"):
        import_checkpoint(source, tmp_path / "out")
