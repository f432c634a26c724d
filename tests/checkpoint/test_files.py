"""A checkpoint of one process: what is in it, what is refused, what a failure leaves behind."""

import json
import os
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.checkpoint import (
    BackgroundSaver,
    DamagedCheckpointError,
    find_checkpoints,
    load_checkpoint,
    manifest,
    read_tensors,
    retain,
    save_checkpoint,
    shard,
    verify,
    write,
)
from stacey_dist.checkpoint.manifest import FORMAT, UnknownFormatError, sha256, step_of
from stacey_dist.checkpoint.write import clear_leftovers
from stacey_dist.errors import SettingsError
from stacey_dist.training.optimizers import build_optimizer
from stacey_dist.training.settings.config import OptimizerConfig
from tests.marks import MUON


def save(directory, step, model, optimizer, extra):
    return save_checkpoint(directory / f"step_{step:08d}", model, optimizer, extra)


def make_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    model[2].weight = torch.nn.Parameter(model[2].weight.detach())
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", ["stacey", "lp_descent", "adamw", "adam", "lion", "sgd", MUON])
def test_checkpoint_round_trip_is_exact_for_every_optimizer(name, tmp_path):
    def train(model, optimizer, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 3, generator=generator)).square().mean().backward()
            optimizer.step()

    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(name=name), seed=0)
    train(model, optimizer, 3, seed=0)
    path = save(tmp_path, 3, model, optimizer, {"note": [1, None]})
    other = make_model()
    other_optimizer = build_optimizer(other, OptimizerConfig(name=name), seed=0)
    train(other, other_optimizer, 1, seed=9)
    manifest = load_checkpoint(path, other, other_optimizer)
    assert manifest["extra"] == {"note": [1, None]}
    for pair in ((model, optimizer), (other, other_optimizer)):
        train(*pair, 3, seed=1)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            restored = other_optimizer.state[b][key]
            assert value.dtype == restored.dtype
            assert torch.equal(value, restored)


def test_paths_may_be_text(tmp_path):
    model = make_model()
    optimizer = Stacey(p for p in model.parameters() if p.requires_grad)
    path = save_checkpoint(str(tmp_path / "step_00000001"), model, optimizer)
    saver = BackgroundSaver()
    saver.save(str(tmp_path / "step_00000002"), model, optimizer)
    saver.wait()
    for found in (path, tmp_path / "step_00000002"):
        assert load_checkpoint(str(found), model, optimizer)["files"] == verify(str(found))["files"]
        assert torch.equal(read_tensors(str(found))["model/0.weight"], model[0].weight)


def test_buffers_and_tied_parameters_are_saved_once(tmp_path):
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    model.b.weight = model.a.weight
    model.norm = torch.nn.BatchNorm1d(3)
    optimizer = build_optimizer(model, OptimizerConfig(), seed=0)
    model.norm.running_mean.fill_(0.5)
    path = save(tmp_path, 1, model, optimizer, {})
    model.norm.running_mean.zero_()
    with torch.no_grad():
        expected = model.a.weight.clone()
        model.a.weight.zero_()
    load_checkpoint(path, model, optimizer)
    assert torch.equal(model.b.weight, expected)
    assert model.norm.running_mean.tolist() == [0.5] * 3


def test_tensors_without_elements_are_a_part_of_the_model(tmp_path):
    def make():
        model = torch.nn.Linear(2, 1)
        model.trained, model.frozen = (torch.nn.Parameter(torch.zeros(0, 3)) for _ in range(2))
        model.frozen.requires_grad_(False)
        model.register_buffer("buffer", torch.zeros(0))
        optimizer = build_optimizer(model, OptimizerConfig(), seed=0)
        return model, optimizer

    model, optimizer = make()
    (model(torch.ones(1, 2)).sum() + model.trained.sum()).backward()
    optimizer.step()
    path = save(tmp_path, 1, model, optimizer, {})
    other, other_optimizer = make()
    load_checkpoint(path, other, other_optimizer)
    assert torch.equal(other.weight, model.weight)
    assert read_tensors(path)["model/trained"].shape == (0, 3)
    smaller = torch.nn.Linear(2, 1)
    smaller_optimizer = build_optimizer(smaller, OptimizerConfig(), seed=0)
    with pytest.raises(DamagedCheckpointError, match=r"\(0,\) float32 in the checkpoint, but absent in the model"):
        load_checkpoint(path, smaller, smaller_optimizer)


def test_a_checkpoint_of_another_shape_changes_nothing(tmp_path):
    small, large = torch.nn.Linear(3, 3), torch.nn.Linear(3, 5)
    path = save(tmp_path, 1, small, build_optimizer(small, OptimizerConfig(), 0), {})
    before = large.weight.clone()
    with pytest.raises(DamagedCheckpointError, match=r"bias is \(3,\) float32 in the checkpoint, but \(5,\) float32"):
        load_checkpoint(path, large, build_optimizer(large, OptimizerConfig(), 0))
    assert torch.equal(large.weight, before)
    narrow = torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    with pytest.raises(DamagedCheckpointError, match=r"float32 in the checkpoint, but \(3,\) bfloat16 in the model"):
        load_checkpoint(path, narrow, build_optimizer(narrow, OptimizerConfig(), 0))


@pytest.mark.parametrize("change", [{"processes": 7}, {"files": {}}, {"extra": {"skipped_steps": 1}}])
def test_an_altered_manifest_is_not_believed(tmp_path, change):
    model = torch.nn.Linear(3, 3)
    path = save(tmp_path, 1, model, build_optimizer(model, OptimizerConfig(), 0), {})
    manifest = json.loads((path / "manifest.json").read_text())
    for content in ({**manifest, **change}, {"format": 2}):
        (path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(DamagedCheckpointError, match=r"manifest.json: its content does not match its checksum"):
            verify(path)


@pytest.mark.parametrize("file", ["shard-00001-model-00001-of-00001.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "empty"])
def test_every_damage_is_named(tmp_path, file, damage):
    model = make_model()
    path = save(tmp_path, 1, model, build_optimizer(model, OptimizerConfig(), 0), {})
    verify(path)
    broken = path / file
    content = bytearray(broken.read_bytes())
    if damage == "remove":
        broken.unlink()
    elif damage == "truncate":
        broken.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        broken.write_bytes(b"")
    else:
        content[len(content) - 4] ^= 0x40  # a value; a bracket
        broken.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=file):
        verify(path)


def test_a_newer_version_is_told_from_damage(tmp_path):
    model = make_model()
    path = save(tmp_path, 1, model, build_optimizer(model, OptimizerConfig(), 0), {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": FORMAT + 1, "new": 1}))
    with pytest.raises(UnknownFormatError, match=rf"format {FORMAT + 1}, but this version .* reads format {FORMAT}"):
        load_checkpoint(path, model, build_optimizer(model, OptimizerConfig(), 0))


def test_a_failed_write_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    save(tmp_path, 1, model, optimizer, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stacey_dist.checkpoint.manifest.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, model, optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    verify(tmp_path / "step_00000001")


def test_nothing_but_a_checkpoint_is_replaced(tmp_path, monkeypatch):
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    (folder := tmp_path / "out").mkdir()
    (folder / "notes.txt").write_text("mine")
    save(folder, 1, model, optimizer, {})
    monkeypatch.chdir(folder)
    for path in (folder, ".", folder / "notes.txt"):
        with pytest.raises(SettingsError, match="is there already and is not a checkpoint; name a new directory"):
            save_checkpoint(path, model, optimizer)
    assert sorted(entry.name for entry in folder.iterdir()) == ["notes.txt", "step_00000001"]
    (weights := tmp_path / "weights").mkdir()
    (weights / "model.safetensors").write_text("mine")
    (site := tmp_path / "site").mkdir()
    (site / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder / "step_00000001")
    for path in (weights, site, tmp_path / "link"):
        with pytest.raises(SettingsError, match="is there already and is not a checkpoint"):
            save_checkpoint(path, model, optimizer)
    (tmp_path / "empty").mkdir()
    (folder / "step_00000001/manifest.json").unlink()
    for path in (tmp_path / "empty", folder / "step_00000001"):
        assert verify(save_checkpoint(path, model, optimizer, {"number": 4}))["extra"] == {"number": 4}


def test_one_of_the_same_name_is_replaced_once_the_new_one_is_complete(tmp_path, monkeypatch):
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    path = save_checkpoint(tmp_path / "latest", model, optimizer, {"note": 1})
    there = []

    def removed(directory, **_):
        there.append(verify(path)["extra"]["note"])
        original(directory, ignore_errors=True)

    original = shutil.rmtree
    monkeypatch.setattr("stacey_dist.checkpoint.write.shutil.rmtree", removed)
    save_checkpoint(path, model, optimizer, {"note": 2})
    assert sorted(set(there)) == [1, 2], "whatever is deleted, a complete one is there"
    assert verify(path)["extra"] == {"note": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_retention_and_strangers(tmp_path):
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    (tmp_path / ".step_00000009.tmp").mkdir()  # left by a kill, or of somebody who saves beside this
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_best").mkdir()
    for step in (5, 100, 20):
        save(tmp_path, step, model, optimizer, {})
    assert (tmp_path / ".step_00000009.tmp").exists()
    (tmp_path / ".step_00000101.tmp").mkdir()  # a save that goes on in the background
    retain(tmp_path / "step_00000100", keep_last=2)
    assert [path.name for path in tmp_path.glob(".*")] == [".step_00000101.tmp"]
    clear_leftovers(tmp_path)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["step_00000100", "step_00000020"]
    assert {p.name for p in tmp_path.iterdir()} == {"notes", "step_best", "step_00000100", "step_00000020"}
    # 100 was damaged, say, and the run went on from 20: what it saves now is not to be deleted for the sake of 100
    saved = save(tmp_path, 40, model, optimizer, {})
    retain(saved, keep_last=1)
    assert [p.name for p in find_checkpoints(tmp_path)] == ["step_00000100", "step_00000040"]


def test_a_checkpoint_that_cannot_be_deleted_keeps_its_name(tmp_path, monkeypatch):
    """Its owner protects it, for example."""
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer, {})

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(PermissionError, match="step_00000001"):
            retain(tmp_path / "step_00000002", keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    verify(tmp_path / "step_00000001")
    save(tmp_path, 3, model, optimizer, {})
    rmtree = shutil.rmtree

    def refuse_the_second(path, **options):
        if "step_00000002" in str(path):
            refuse(path)
        rmtree(path, **options)

    with monkeypatch.context() as patch:  # the others are deleted all the same
        patch.setattr(shutil, "rmtree", refuse_the_second)
        with pytest.raises(PermissionError, match="step_00000002"):
            retain(tmp_path / "step_00000003", keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]

    def half(path, **_):
        (Path(path) / "manifest.json").unlink()
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(OSError, match="Input/output error"):
            retain(tmp_path / "step_00000003", keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_00000002.tmp", "step_00000003"]


def test_a_link_to_a_checkpoint_is_deleted_and_not_its_target(tmp_path):
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer, {})
    (tmp_path / "step_00000001").rename(tmp_path / "elsewhere")
    (tmp_path / "step_00000001").symlink_to(tmp_path / "elsewhere")
    retain(tmp_path / "step_00000002", keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "step_00000002"]
    verify(tmp_path / "elsewhere")


@pytest.mark.parametrize("value", [[torch.zeros(2)], 3, torch.zeros(7)], ids=["a list", "a number", "a tensor"])
def test_state_that_would_be_lost_is_refused(tmp_path, value):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"momentum_buffer": None, "other": value}
    with pytest.raises(SettingsError, match=r"SGD keeps other of weight .*only tensors that are shaped"):
        save(tmp_path, 1, model, optimizer, {})
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(shard, "_MAX_HEADER_BYTES", 100)
    with pytest.raises(SettingsError, match="safetensors reads at most 100 MB; save with more ranks"):
        save(tmp_path, 1, model, build_optimizer(model, OptimizerConfig(), 0), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("again", ["save", "clear"])
def test_a_replacement_that_is_not_completed_keeps_the_old_one(tmp_path, monkeypatch, again):
    model = make_model()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    path = save(tmp_path, 7, model, optimizer, {"number": 1})
    rename = Path.rename

    def breaks(self, target):
        if self.name.endswith((".tmp", ".safetensors")):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", breaks)
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path, 7, model, optimizer, {"number": 2})
    monkeypatch.undo()
    assert verify(path)["extra"] == {"number": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    path.rename(tmp_path / f".{path.name}.tmp-replaced")  # a kill between the two renames
    if again == "clear":
        clear_leftovers(tmp_path)
    else:  # and this save fails
        monkeypatch.setattr(write, "write_shard", breaks)
        with pytest.raises(OSError, match="Input/output error"):
            save(tmp_path, 7, model, optimizer, {"number": 3})
    assert verify(path)["extra"] == {"number": 1}


def test_a_file_that_cannot_be_read_for_a_moment(tmp_path, monkeypatch):
    path = save(tmp_path, 1, model := make_model(), build_optimizer(model, OptimizerConfig(), 0), {})
    failures = iter([OSError(116, "Stale file handle"), OSError(5, "Input/output error")])

    def hiccup(file):
        if (error := next(failures, None)) is not None:
            raise error
        return sha256(file)

    monkeypatch.setattr(manifest, "sha256", hiccup)
    monkeypatch.setattr(manifest, "_READ_AGAIN_SECONDS", 0.0)
    verify(path)
    # Its manifest, too.
    failures, read = iter([OSError(116, "Stale file handle"), OSError(24, "Too many open files")]), manifest.read_json

    def fail_twice(file):
        if (error := next(failures, None)) is not None:
            raise error
        return read(file)

    monkeypatch.setattr(manifest, "read_json", fail_twice)
    assert verify(path)["format"] == manifest.FORMAT
    failures = iter([OSError(5, "Input/output error")] * 5)
    with pytest.raises(DamagedCheckpointError, match="Input/output error"):
        verify(path)
    monkeypatch.setattr(manifest, "sha256", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(DamagedCheckpointError, match="Input/output error"):
        verify(path)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_directory_is_not_called_empty(tmp_path, kind):
    assert find_checkpoints(tmp_path / "checkpoints") == []
    if kind == "link":
        (tmp_path / "checkpoints").symlink_to(tmp_path / "a disk that is away")
    else:
        (tmp_path / "checkpoints").touch()
    with pytest.raises(SettingsError, match="checkpoints is not a directory, or is a link to one that is not there"):
        find_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize(("number", "passes"), [(22, True), (95, True), (9, True), (5, False)])
def test_a_file_system_that_cannot_sync_directories(tmp_path, monkeypatch, number, passes):
    model, fsync = make_model(), os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with nullcontext() if passes else pytest.raises(OSError, match="Input/output error"):
        verify(save(tmp_path, 1, model, build_optimizer(model, OptimizerConfig(), 0), {}))


def test_two_tensors_of_one_name_are_refused(tmp_path):
    model = torch.nn.Module()
    model.module = torch.nn.Linear(2, 2, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(SettingsError, match=r"weight and module\.weight of the model would both be saved as weight"):
        save(tmp_path, 1, model, Stacey(model.parameters()), {})


def test_state_that_cannot_be_saved_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.NAdam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(SettingsError, match=r"NAdam keeps mu_product of weight in the shape \(\)"):
        save(tmp_path, 1, model, optimizer, {})


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = save(tmp_path, 1, model, optimizer, {})
    with pytest.raises(DamagedCheckpointError, match="state is exp_avg, exp_avg_sq in the checkpoint, but m, z"):
        load_checkpoint(path, model, Stacey(model.parameters()))


def test_checkpoints_that_are_kept_for_good(tmp_path):
    for step in (10, 20, 25, 30, 40, 45):
        (tmp_path / f"step_{step:08d}").mkdir()
    retain(f"{tmp_path}/step_00000045", keep_last=2, keep_every=20)
    assert [step_of(p) for p in find_checkpoints(str(tmp_path))] == [45, 40, 20]
    with pytest.raises(ValueError, match="/best is not named as a checkpoint, like step_00000100"):
        retain(tmp_path / "best", keep_last=1)
    assert len(find_checkpoints(tmp_path)) == 3


def test_a_full_disk_is_an_os_error(tmp_path):
    import resource

    model = torch.nn.Linear(200, 200)
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    save(tmp_path, 1, model, optimizer, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"shard-00001-model-00001-of-00001.safetensors: .*File too large"):
            save(tmp_path, 2, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_dtype_that_cannot_be_saved_is_named(tmp_path):
    model = torch.nn.Module()
    model.register_buffer("phases", torch.zeros(3, dtype=torch.complex64))
    model.weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(SettingsError, match=r"model/phases: tensors of torch\.complex64 can't be saved"):
        save(tmp_path, 1, model, build_optimizer(model, OptimizerConfig(), 0), {})
    assert list(tmp_path.iterdir()) == []


def test_tensors_in_another_order_than_row_major_are_saved_and_loaded(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, Stacey(model.parameters())

    model, optimizer = make()
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    path = save(tmp_path, 1, model, optimizer, {})
    other, restored = make()
    load_checkpoint(path, other, restored)
    for param, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param, same)
        assert same.stride() == param.stride()
        for name in ("z", "m"):
            assert torch.equal(optimizer.state[param][name], restored.state[same][name])
