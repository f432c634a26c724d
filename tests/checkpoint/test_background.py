"""Saves beside a program that goes on: what it changes meanwhile, and its end."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.checkpoint import BackgroundSaver, load_checkpoint, read_tensors, save_checkpoint, verify, write
from stacey_dist.checkpoint.importers import import_checkpoint
from stacey_dist.errors import SettingsError
from tests.checkpoint.foreign import MAKERS


def make():
    model = torch.nn.Linear(3, 3)
    model.register_buffer("count", torch.zeros(2))
    optimizer = Stacey(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_a_program_adds_is_copied(tmp_path, monkeypatch):
    extra, original = {"step": 1, "inner": {"position": 8}}, write.write_shard

    def slow(*arguments):
        extra["step"] = 2
        extra["inner"]["position"] = 16
        return original(*arguments)

    monkeypatch.setattr(write, "write_shard", slow)
    saver = BackgroundSaver()
    saver.save(tmp_path / "step_00000001", *make(), extra)
    saver.wait()
    assert verify(tmp_path / "step_00000001")["extra"] == {"step": 1, "inner": {"position": 8}}


@pytest.mark.parametrize("extra", [{"a": torch.zeros(1)}, {"a": {1, 2}}, {(1, 2): 3}, [1], {1: "a", "1": "b"}], ids=str)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(write, "write_shard", lambda *_: pytest.fail("it was written"))
    for save in (save_checkpoint, BackgroundSaver().save):
        with pytest.raises(SettingsError, match="extra can't be saved: "):
            save(tmp_path / "step_00000001", *make(), extra)
    with pytest.raises(SettingsError, match="extra can't be saved: "):
        import_checkpoint(tmp_path, tmp_path / "step_00000001", extra=extra)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_that_ends_waits_for_its_last_save(tmp_path, fails):
    program = f"""
        import time
        from stacey_dist.checkpoint import BackgroundSaver, write
        from tests.checkpoint.test_background import make

        original = write.write_shard

        def slow(*arguments):
            time.sleep(1)
            if {fails}:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        write.write_shard = slow
        BackgroundSaver().save({str(tmp_path / "step_00000001")!r}, *make())
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    if fails:
        assert "the last checkpoint failed: OSError: [Errno 28] No space left on device" in ended.stderr
        assert list(tmp_path.iterdir()) == []
    else:
        verify(tmp_path / "step_00000001")


def test_tensors_in_host_memory_are_made_there(tmp_path):
    """Whatever torch's default device is."""
    model, optimizer = make()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.set_default_device("meta")
    try:
        path = save_checkpoint(tmp_path / "step_00000001", model, optimizer)
        with torch.no_grad():
            model.weight.zero_()
        load_checkpoint(path, model, optimizer)
        there = read_tensors(path)
        for name, maker in MAKERS.items():
            with torch.device("cpu"):
                maker(tmp_path / name)
            import_checkpoint(tmp_path / name, tmp_path / f"{name} imported")
    finally:
        torch.set_default_device(None)
    assert torch.equal(model.weight, expected["weight"])
    assert all(torch.equal(there[f"model/{name}"], tensor) for name, tensor in expected.items())


def test_a_path_may_be_the_working_directory(tmp_path, monkeypatch):
    model, optimizer = make()
    for name in ("save", "beside", "import"):
        (tmp_path / name).mkdir()
    MAKERS["zero1"](tmp_path / "foreign")
    monkeypatch.chdir(tmp_path / "save")
    save_checkpoint(".", model, optimizer)
    monkeypatch.chdir(tmp_path / "beside")
    saver = BackgroundSaver()
    saver.save(".", model, optimizer)
    saver.wait()
    assert saver.failure() is None
    monkeypatch.chdir(tmp_path / "import")
    import_checkpoint(tmp_path / "foreign", path=type(tmp_path)("."))
    for name in ("save", "beside", "import"):
        verify(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["beside", "foreign", "import", "save"]


def test_a_manifest_needs_the_memory_of_its_size(tmp_path):
    path = save_checkpoint(tmp_path / "step_00000001", *make())
    program = """
        import resource, sys
        from pathlib import Path
        from stacey_dist.files import read_json

        there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (there + (500 << 20), resource.RLIM_INFINITY))
        read_json(Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), path / "manifest.json"]
    subprocess.run(command, check=True)
    assert json.loads((path / "manifest.json").read_text())["format"] == 2


def test_a_relative_path_is_that_of_the_call(tmp_path, monkeypatch):
    """The program may change its directory while the save is written."""
    original = write.write_shard

    def elsewhere(*arguments):
        os.chdir(tmp_path / "b")
        return original(*arguments)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(write, "write_shard", elsewhere)
    monkeypatch.chdir(tmp_path / "a")
    saver = BackgroundSaver()
    saver.save("step_00000001", *make())
    saver.wait()
    assert saver.failure() is None
    verify(tmp_path / "a" / "step_00000001")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_path_over_a_link_is_that_of_the_system(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    saver = BackgroundSaver()
    saver.save(tmp_path / "link" / ".." / "step_00000001", *make())
    saver.wait()
    assert saver.failure() is None
    verify(tmp_path / "disk" / "step_00000001")


def test_the_failure_is_that_of_the_last_save(tmp_path, monkeypatch):
    saver = BackgroundSaver()
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_shard", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(tmp_path / "step_00000001", *make())
        saver.wait()
    assert saver.failed_in_a_row == 1
    saver.save(tmp_path / "step_00000002", *make())
    saver.wait()
    assert (saver.failed_in_a_row, saver.failure()) == (0, None)
