"""Where an export may be written, and what is there when it failed."""

import json
import os
import shutil
import stat

import pytest

from stacey_dist import Stacey
from stacey_dist.checkpoint import save_checkpoint, verify
from stacey_dist.cli import main
from stacey_dist.errors import SettingsError
from stacey_dist.models import export_directory
from stacey_dist.models.export import describe_model, export_model
from stacey_dist.models.export_directory import MARKER, output_directory
from tests.test_docs import tiny_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a checkpoint."""
    model = tiny_llama()
    path = tmp_path_factory.mktemp("run") / "step_00000001"
    return save_checkpoint(path, model, Stacey(model.parameters()), {"step": 1, "model": describe_model(model)})


def contents(directory):
    """Return every entry below a directory: its mode, and its bytes or where it leads."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mode,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(directory.rglob("*"))
    }


def write_text(directory, text):
    with output_directory(directory) as new:
        (new / "config.json").write_text(text)
        (new / "more").mkdir()
        (new / "more" / "a.json").write_text(text)


def test_an_export_into_a_checkpoint_leaves_it_as_it_was(saved, tmp_path, capsys):
    copy = tmp_path / "step_00000001"
    shutil.copytree(saved, copy)
    before = contents(copy)
    assert main(["checkpoint", "export", str(copy), str(copy)]) == 2
    error = capsys.readouterr().err
    assert f"{copy} holds manifest.json, which no export wrote" in error
    assert error.count("\n") == 1
    assert contents(copy) == before
    verify(copy)


@pytest.mark.parametrize("what", ["file", "safetensors", "link", "dangling link", "pipe", "directory", "forged list"])
def test_a_directory_of_others_is_left_as_it_was(saved, tmp_path, what):
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("mine")
    out.mkdir()
    if what == "file":
        (out / "notes.txt").write_text("mine")
    elif what == "safetensors":
        (out / "private.safetensors").touch(mode=0o600)
    elif what == "link":
        (out / "config.json").symlink_to(victim)
    elif what == "dangling link":
        (out / "model.safetensors").symlink_to(tmp_path / "not there")
    elif what == "pipe":
        os.mkfifo(out / MARKER)
    elif what == "directory":
        (out / "model.safetensors").mkdir()
        (out / "model.safetensors" / "mine").touch()
    else:
        (out / "config.json").symlink_to(victim)
        (out / MARKER).write_text(json.dumps({"files": ["config.json", MARKER]}))
    before = contents(tmp_path)
    for unlisted in (False, True):
        with pytest.raises(SettingsError, match=r"holds .*, which no export wrote"):
            export_model(saved, out, unlisted=unlisted)
    assert contents(tmp_path) == before


def test_a_link_to_a_directory_and_a_file_are_refused(saved, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(SettingsError, match="out is a symbolic link"):
        export_model(saved, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="file is no directory"):
        export_model(saved, tmp_path / "file")


@pytest.mark.parametrize("mounted", [False, True])
def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path, monkeypatch, mounted):
    out = tmp_path / "out"
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    out.mkdir(mode=0o700)
    write_text(out, "1")
    (tmp_path / "beside").touch(mode=0o600)
    with output_directory(out) as new:
        (new / "config.json").write_text("2")
        (new / "model.safetensors").write_text("2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beside", "out"]
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "more", MARKER}
    assert (out / "more" / "a.json").read_text() == "1"
    assert (out / "config.json").read_text() == "2"
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    write_text(out, "3")
    assert (out / "more" / "a.json").read_text() == "3"
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("mounted", [False, True])
def test_an_export_that_fails_leaves_the_older_one(tmp_path, monkeypatch, mounted):
    out = tmp_path / "out"
    write_text(out, "1")
    before = contents(tmp_path)
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)

    def interrupted():
        with output_directory(out) as new:
            (new / "config.json").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == before
    # A kill while it was filled: what is left is taken away by the next one.
    leftover = out / export_directory._INSIDE if mounted else tmp_path / ".out.export-tmp"
    leftover.mkdir()
    (leftover / "config.json").touch()
    write_text(out, "2")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (out / export_directory._INSIDE).exists()


@pytest.mark.parametrize("moves", range(1, 6))
def test_a_kill_within_a_mount_point_leaves_no_mixture(tmp_path, monkeypatch, moves):
    out, replace = tmp_path / "out", os.replace
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", MARKER]
    monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    out.mkdir()

    def fill(text):
        with output_directory(out) as new:
            for name in names[:-1]:
                (new / name).write_text(text)

    left = iter(range(moves - 1))

    def killed(source, target):
        if source.parent.name == export_directory._INSIDE and next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    fill("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fill("new")
    there = {(out / name).read_text() for name in names[:-1] if (out / name).exists()}
    assert len(there) == 1 or not (out / "config.json").exists()
    fill("newer")
    assert sorted(os.listdir(out)) == names


def test_the_working_directory_is_filled_from_within(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert main(["checkpoint", "export", str(saved), "."]) == 0
    assert "config.json" in os.listdir(".")


def test_a_kill_between_the_two_renames_is_made_good_by_the_next_export(tmp_path):
    write_text(tmp_path / "out", "1")
    before = contents(tmp_path)
    (tmp_path / "out").rename(tmp_path / ".out.export-replaced")
    with pytest.raises(OSError, match="full"), output_directory(tmp_path / "out"):
        raise OSError("full")
    assert contents(tmp_path) == before


def test_what_a_run_of_an_older_version_exported_is_replaced_by_a_run(saved, tmp_path):
    export_model(saved, tmp_path / "model")
    (tmp_path / "model" / MARKER).unlink()
    with pytest.raises(SettingsError, match="which no export wrote"):
        export_model(saved, tmp_path / "model")
    export_model(saved, tmp_path / "model", beside=lambda new: (new / "tokenizer.json").touch(), unlisted=True)
    assert {"tokenizer.json", "config.json", "model.safetensors", MARKER} <= set(os.listdir(tmp_path / "model"))


def test_the_modes_of_an_export_are_the_users(saved, tmp_path):
    export_model(saved, tmp_path / "model")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1
