"""Manifests that somebody has made: an entry that is not what the format has is named, whatever the checksum says."""

import json
import os

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.checkpoint import DamagedCheckpointError, read_tensors, save_checkpoint, verify
from stacey_dist.checkpoint.manifest import MANIFEST, digest, read_manifest
from stacey_dist.checkpoint.shard import Range, read_shards, shard_name, write_shard
from stacey_dist.cli import main
from stacey_dist.errors import SettingsError


@pytest.fixture
def saved(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = Stacey(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return save_checkpoint(tmp_path / "step_00000001", model, optimizer, {"step": 1})


def test_it_is_what_json_makes_of_it(saved):
    manifest = read_manifest(saved)
    assert (saved / MANIFEST).read_text() == json.dumps(manifest | {"sha256": digest(manifest)}, sort_keys=True)


def forge(path, change):
    """Change the manifest and give it a checksum of its own."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def entry(name, value):
    return lambda m: m.update({name: value})


def tensor(value):
    return lambda m: m["tensors"].update({"model/weight": value})


def file(name, value=None):
    value = {"bytes": 1, "sha256": "0" * 64} if value is None else value
    return lambda m: m["files"].update({name: value})


FORGED = {
    "no tensors": lambda m: m.pop("tensors"),
    "no files": lambda m: m.pop("files"),
    "no extra": lambda m: m.pop("extra"),
    "no processes": lambda m: m.pop("processes"),
    "no versions": lambda m: m.pop("versions"),
    "versions": entry("versions", ["1"]),
    "version": entry("versions", {"torch": 2}),
    "processes": entry("processes", "2"),
    "true processes": entry("processes", True),
    "zero processes": entry("processes", 0),
    "extra": entry("extra", [1]),
    "format": entry("format", "2"),
    "format true": entry("format", True),
    "tensors": entry("tensors", [1]),
    "three": tensor([[2, 3], "float32", 1]),
    "text": tensor("ab"),
    "shape": tensor([6, "float32"]),
    "negative": tensor([[-2, -3], "float32"]),
    "fraction": tensor([[2.0, 3], "float32"]),
    "not a number": tensor([[float("nan")], "float32"]),
    "true": tensor([[True, 6], "float32"]),
    "terabytes": tensor([[10**6, 10**6], "float32"]),
    "overflow": tensor([[0, 2**62, 2**62], "float32"]),
    "huge": tensor([[0, 2**64], "float32"]),
    "dtype": tensor([[2, 3], "nn"]),
    "dtype of torch": tensor([[2, 3], "complex64"]),
    "dtype number": tensor([[2, 3], 7]),
    "dtype list": tensor([[2, 3], ["float32"]]),
    "kind": lambda m: m["tensors"].update({"models/weight": [[0], "float32"]}),
    "name": lambda m: m["tensors"].update({"optimizer/weight": [[0], "float32"]}),
    "surrogate": lambda m: m["tensors"].update({"model/\ud800": [[0], "float32"]}),
    "step": lambda m: m["tensors"].update({"optimizer/weight/step": [[2], "float32"]}),
    "files": entry("files", ["a"]),
    "parent": file("../a.safetensors"),
    "root": file("/etc/passwd"),
    "hidden": file(".safetensors"),
    "suffix": file("a.pt"),
    "new line": file("a.safetensors\n"),
    "no size": file("a.safetensors", {"sha256": "0" * 64}),
    "negative size": file("a.safetensors", {"bytes": -1, "sha256": "0" * 64}),
    "text size": file("a.safetensors", {"bytes": "1", "sha256": "0" * 64}),
    "no checksum": file("a.safetensors", {"bytes": 1}),
    "short checksum": file("a.safetensors", {"bytes": 1, "sha256": "0"}),
    "checksum": file("a.safetensors", {"bytes": 1, "sha256": 7}),
    "file": file("a.safetensors", 7),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest_is_one_line(saved, tmp_path, capsys, name):
    forge(saved, FORGED[name])
    for command in (["show"], ["verify"], ["diff", saved], ["export", tmp_path / "out"]):
        at = [command[0], str(saved), *map(str, command[1:])]
        assert main(["checkpoint", *at]) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert f"damaged: {saved / MANIFEST}: " in error
        assert error.count("\n") == 1
        assert len(error) < 600
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert f"damaged: {saved / MANIFEST}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested deeper than 100 levels"),
        (b"[" * 500 + b"]" * 500, "nested deeper than 100 levels"),
        (b'{"format": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"format": 2, "format": 3}', "the key 'format' is there twice"),
        (b"7", "TypeError"),
        (b"\xff\xfe", ""),
        (b"", "Expecting value"),
        (b"null", "TypeError"),
        (b'"format"', "TypeError"),
        (b"[]", "TypeError"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_json_that_no_checkpoint_has(saved, capsys, content, message):
    (saved / MANIFEST).write_bytes(content)
    assert main(["checkpoint", "verify", str(saved)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def special(path, kind, directory):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "link to a directory":
        path.symlink_to(directory)
    else:
        os.mkfifo(directory / "pipe")
        path.symlink_to(directory / "pipe")


KINDS = ["pipe", "device", "directory", "link to a directory", "link to a pipe"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["manifest", "shard"])
def test_what_is_no_regular_file_is_not_waited_for(saved, tmp_path, capsys, kind, which):
    target = saved / (MANIFEST if which == "manifest" else shard_name(0))
    special(target, kind, tmp_path)
    assert main(["checkpoint", "verify", str(saved)]) == 1
    error = capsys.readouterr().err
    assert str(target) in error
    assert "where a regular file belongs" in error
    assert error.count("\n") == 1
    with pytest.raises((OSError, DamagedCheckpointError), match="where a regular file belongs"):
        read_tensors(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_no_file_is_not_waited_for(tmp_path, capsys, kind):
    model = tmp_path / "model"
    model.mkdir()
    special(model / "config.json", kind, tmp_path)
    assert main(["checkpoint", "import", str(tmp_path), str(tmp_path / "out"), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert f"--model {model}: " in error
    assert "where a regular file belongs" in error
    assert error.count("\n") == 1


def test_a_link_to_a_regular_file_is_followed(saved, tmp_path):
    for name in (MANIFEST, shard_name(0)):
        (saved / name).rename(tmp_path / name)
        (saved / name).symlink_to(tmp_path / name)
    verify(saved)


def test_what_could_not_be_read_is_not_saved(tmp_path):
    model = torch.nn.Linear(2, 2)
    deep = [1]
    for _ in range(150):
        deep = [deep]
    for extra, message in (({"a": deep}, "nested deeper"), ({1: "a", "1": "b"}, "the key '1' is there twice")):
        with pytest.raises(SettingsError, match=message):
            save_checkpoint(tmp_path / "step_00000001", model, Stacey(model.parameters()), extra)
    assert list(tmp_path.iterdir()) == []


def test_text_of_others_is_shown_in_one_line(saved, capsys):
    forge(saved, lambda m: m["extra"].update({"engine": "a\x1b[2J\nb\ud800", "step": [1, "\r"]}))
    forge(saved, lambda m: m["versions"].update({"torch": "2\n\x1b]0;"}))
    assert main(["checkpoint", "show", str(saved)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("a\\x1b[2J\\nb\\ud800, 1 process")
    assert "torch 2\\n\\x1b]0;\n" in out
    assert "\x1b" not in out


def test_entries_of_later_versions_are_let_through(saved):
    forge(saved, entry("later", {"a": [None]}))
    assert read_manifest(saved)["later"] == {"a": [None]}


def test_elements_are_counted_by_where_they_are(tmp_path):
    """Two files that have the same half make no whole."""
    values = torch.arange(10.0)
    for rank, (start, stop) in enumerate([(0, 5), (0, 5)]):
        write_shard(tmp_path / shard_name(rank), {"model/a": Range(start, values[start:stop])})
    names = [shard_name(0), shard_name(1)]
    with pytest.raises(OSError, match="do not have all of model/a"):
        read_shards(tmp_path, names, {"model/a": Range(0, torch.zeros(10))})
    write_shard(tmp_path / shard_name(1), {"model/a": Range(3, values[3:9])})
    with pytest.raises(OSError, match="do not have all of model/a"):
        read_shards(tmp_path, names, {"model/a": Range(0, torch.zeros(10))})
    write_shard(tmp_path / shard_name(2), {"model/a": Range(8, values[8:])})
    wanted = torch.zeros(10)
    read_shards(tmp_path, [shard_name(2), *names], {"model/a": Range(0, wanted)})
    assert torch.equal(wanted, values)


@pytest.mark.parametrize("information", ['{"model/a": {"saved_offsets": [%s]}}', '{"model/a": %s}', "%s"])
@pytest.mark.parametrize("value", ["-1", "0.5", "true", "null", '"0"', "[[0]]", "9" * 5000, "[" * 5000, "0, 0", "{}"])
def test_a_forged_header_of_a_shard_names_the_file(tmp_path, information, value):
    file = tmp_path / shard_name(0)
    write_shard(file, {"model/a": Range(0, torch.arange(4.0))})
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"]["DCP_SHARDING_INFO"] = information % value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(OSError, match=str(tmp_path)):
        read_shards(tmp_path, [shard_name(0)], {"model/a": Range(0, torch.zeros(4))})


def test_a_shard_of_another_dtype_is_read_only_if_nothing_is_lost(tmp_path):
    write_shard(tmp_path / shard_name(0), {"a": Range(0, torch.tensor([3.0])), "b": Range(0, torch.tensor([0.1]))})
    step = torch.zeros(1, dtype=torch.int64)
    read_shards(tmp_path, [shard_name(0)], {"a": Range(0, step)})
    assert step.tolist() == [3]
    with pytest.raises(OSError, match=r"b is torch\.float32, which torch\.bfloat16 does not hold"):
        read_shards(tmp_path, [shard_name(0)], {"b": Range(0, torch.zeros(1, dtype=torch.bfloat16))})
