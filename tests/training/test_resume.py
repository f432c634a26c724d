"""Which checkpoint a run goes on from, and which changes it refuses."""

import copy
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.checkpoint import save_checkpoint
from stacey_dist.errors import SettingsError
from stacey_dist.training.progress import Progress
from stacey_dist.training.resume import restore
from stacey_dist.training.run import Run
from stacey_dist.training.settings.command_line import to_dict
from stacey_dist.training.settings.llm_config import LLMConfig, SourceConfig

DATA = "these data"


class Directory:
    """A run's directory, with a checkpoint after each of `steps`: a model whose weights are all the step."""

    def __init__(self, path, steps=(10, 20), **changes):
        self.path, self.config = path, LLMConfig()
        self.config.run_dir = str(path)
        for step in steps:
            self.save(step, **changes)

    def save(self, step, data=DATA, outputs=3, others=None, **changes):
        model = torch.nn.Linear(2, outputs)
        torch.nn.init.constant_(model.weight, step)
        config = changed(self.config, **changes)
        extra = {
            "step": step, "position": 16 * step, "skipped_steps": 1, "config": to_dict(config), "data_identity": data,
            "scaler": None, "engine": "single", "trackers": {"wandb": "abc"}, **(others or {}),
        }  # fmt: skip
        return save_checkpoint(self.checkpoint(step), model, Stacey(model.parameters()), extra)

    def checkpoint(self, step):
        return self.path / "checkpoints" / f"step_{step:08d}"

    def start(self, data=DATA, **changes):
        """Start a run with these settings; return what it finds: (progress, the weights, the run)."""
        model = torch.nn.Linear(2, 3)
        torch.nn.init.zeros_(model.weight)
        config = changed(self.config, **changes)
        engine = SimpleNamespace(model=model, module=model, optimizer=Stacey(model.parameters()))
        run = Run(config, SimpleNamespace(num_processes=1, is_main_process=True))
        progress = restore(run, engine, SimpleNamespace(data_identity=data, samples_per_epoch=0))
        return progress, model.weight.unique().tolist(), run


def changed(config, **changes):
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *sections, last = name.split("__")
        target = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, last, value)
    return config


@pytest.fixture
def directory(tmp_path):
    return Directory(tmp_path / "run")


def test_the_newest_is_taken(directory, capsys):
    progress, weights, run = directory.start()
    assert progress == Progress(20, 320, 1, evaluated_step=20)
    assert weights == [20]
    assert run.tracker_ids == {"wandb": "abc"}
    assert f"resumed from {directory.checkpoint(20)} after 20 updates" in capsys.readouterr().out
    assert Directory(directory.path.with_name("new"), steps=()).start()[:2] == (Progress(0, 0, 0), [0])


@pytest.mark.parametrize(
    ("epochs", "samples", "done", "expected"),
    [
        (1.1, 100, (0, 0), 11),
        (5 / 3, 300, (0, 0), 50),
        (1.11, 100, (0, 0), 12),
        (1.1, 100, (4, 20), 13),
        (0.5, 100, (7, 70), 5),
    ],
)
def test_epochs_are_counted_exactly(epochs, samples, done, expected):
    """In floating point, 1.1 * 100 is more than 110."""
    run = object.__new__(Run)
    run.config = LLMConfig()
    run.config.schedule.warmup_steps = 0
    run.config.train.global_batch_size, run.config.train.epochs = 10, epochs
    run.resolve_max_steps(samples, *done)
    assert run.config.train.max_steps == expected


def test_a_checkpoint_may_name_no_trackers(tmp_path):
    assert Directory(tmp_path / "run", others={"trackers": None}).start()[2].tracker_ids == {}


def test_checkpoints_that_may_not_be_listed_are_not_passed_over(directory, monkeypatch):
    """The run would begin anew."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError):
        directory.start()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, remove, empty])
@pytest.mark.parametrize("pattern", ["*.safetensors", "manifest.json"])
def test_a_damaged_one_is_passed_over(directory, capsys, damage, pattern):
    (file,) = directory.checkpoint(20).glob(pattern)
    damage(file)
    assert directory.start()[:2] == (Progress(10, 160, 1, evaluated_step=10), [10])
    assert f"skipped a damaged checkpoint: {file}" in capsys.readouterr().out


def test_what_a_kill_leaves_is_passed_over(directory, capsys):
    shutil.copytree(directory.checkpoint(20), directory.path / "checkpoints" / ".step_00000030.tmp")
    half = directory.checkpoint(40)
    half.mkdir()
    (part,) = directory.checkpoint(20).glob("*.safetensors")
    shutil.copy(part, half)
    assert directory.start()[1] == [20]
    assert f"skipped a damaged checkpoint: {half}/manifest.json" in capsys.readouterr().out


def test_when_all_are_damaged_the_run_does_not_begin_anew_by_itself(directory, capsys):
    for step in (10, 20):
        remove(directory.checkpoint(step) / "manifest.json")
    with pytest.raises(SettingsError, match=r"run_dir: every checkpoint in .* is damaged .* delete them to begin anew"):
        directory.start()
    assert capsys.readouterr().out.count("skipped a damaged checkpoint") == 2
    shutil.rmtree(directory.path / "checkpoints")
    assert directory.start()[:2] == (Progress(), [0])


def test_another_shape_is_refused(directory):
    directory.save(30, outputs=5)
    with pytest.raises(SettingsError, match=r"run_dir: .*step_00000030: bias is \(5,\) float32 in the checkpoint, but"):
        directory.start()


def test_a_newer_format_is_not_passed_over(directory):
    file = directory.checkpoint(20) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(SettingsError, match=r"run_dir: .*format 99, but .* or the version that wrote it"):
        directory.start()


CHANGES = [
    ({"seed": 1}, "seed", "seed: 0 in the checkpoint, 1 now"),
    ({"model__rope_theta": 5e4}, "model.rope_theta", "model.rope_theta: 10000.0 in the checkpoint, 50000.0 now"),
    (
        {"train__global_batch_size": 32},
        "train.global_batch_size",
        "train.global_batch_size: 16 in the checkpoint, 32 now",
    ),
    ({"optimizer__variant": "pp"}, "optimizer.variant", "optimizer.variant: p2 in the checkpoint, pp now"),
    ({"data": "other data"}, "data", "data: the training or held-out data are not those it was trained on"),
    ({"data__sequence_length": 64}, "data.sequence_length", "data.sequence_length: 128 in the checkpoint, 64 now"),
]


@pytest.mark.parametrize(("change", "name", "line"), CHANGES, ids=[name for _, name, _ in CHANGES])
def test_a_changed_run_is_refused_unless_the_change_is_wanted(directory, capsys, change, name, line):
    with pytest.raises(SettingsError, match="belongs to another run") as refused:
        directory.start(**change)
    assert str(refused.value).splitlines()[1:] == [f"  {line}"]
    others = [other for _, other, _ in CHANGES if other != name]
    with pytest.raises(SettingsError, match="belongs to another run"):
        directory.start(**change, checkpoint__allow_changes=others)
    assert directory.start(**change, checkpoint__allow_changes=[name])[:2] == (
        Progress(20, 320, 1, evaluated_step=20),
        [20],
    )
    if name != "data":
        assert f"changed since the checkpoint: {line}" in capsys.readouterr().out


def test_all_differences_are_listed_and_some_are_never_allowed(directory):
    with pytest.raises(SettingsError) as refused:
        directory.start(
            seed=1, optimizer__state_dtype="float32", optimizer__name="adamw", checkpoint__allow_changes=["seed"]
        )
    assert "not possible for optimizer.name and optimizer.state_dtype" in str(refused.value)
    lines = str(refused.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["optimizer.name", "optimizer.state_dtype"]


def test_other_changes_are_said(directory, capsys):
    directory.start(optimizer__lr=1.0, checkpoint__keep_last=7)
    out = capsys.readouterr().out
    assert "changed since the checkpoint: optimizer.lr: 0.0012 in the checkpoint, 1.0 now" in out
    assert "keep_last" not in out


def test_changes_of_a_mixture_are_named(tmp_path, capsys):
    sources = [SourceConfig(files=["a.txt"], weight=3.0), SourceConfig(files=["b.txt"])]
    directory = Directory(tmp_path / "run", data__sources=sources)
    directory.start(data__sources=sources)
    assert "data.sources" not in capsys.readouterr().out
    others = [SourceConfig(files=["a.txt"], weight=2.0), SourceConfig(files=["b.txt"])]
    with pytest.raises(SettingsError, match="belongs to another run") as refused:
        directory.start("other data", data__sources=others)
    lines = [line.strip() for line in str(refused.value).splitlines()[1:]]
    assert lines[0].startswith("data: the training or held-out data are not those")
    assert lines[1:] == ["data.sources[0].weight: 3.0 in the checkpoint, 2.0 now"]
    directory.start("other data", data__sources=others, checkpoint__allow_changes=["data"])
    assert f"changed since the checkpoint: {lines[1]}" in capsys.readouterr().out


def test_never_refuses_a_directory_that_has_one(directory):
    with pytest.raises(SettingsError, match=r"checkpoint.resume: never .* which holds step_00000020"):
        directory.start(checkpoint__resume="never")


def test_resume_from_begins_a_run_and_the_same_command_goes_on_with_it(directory, tmp_path):
    source = str(directory.checkpoint(10))
    branch = Directory(tmp_path / "branch", steps=())
    progress, weights, run = branch.start(checkpoint__resume_from=source)
    assert (progress, weights) == (Progress(10, 160, 1, evaluated_step=10), [10])
    assert run.tracker_ids == {}  # its own trackers, not those of the run that it branches off
    branch.save(15, checkpoint__resume_from=source)
    assert branch.start(checkpoint__resume_from=source)[1] == [15]
    # The source may be gone by then; and without the setting it goes on as well.
    shutil.rmtree(directory.path)
    assert branch.start(checkpoint__resume_from=source)[1] == [15]
    assert branch.start()[1] == [15]


def test_resume_from_does_not_overrule_what_did_not_come_from_there(directory, tmp_path):
    other = Directory(tmp_path / "other")
    for source in (directory.checkpoint(10), other.checkpoint(10)):
        with pytest.raises(SettingsError, match=r"whose newest checkpoint step_00000020 did not come from there"):
            directory.start(checkpoint__resume_from=str(source))
    assert directory.start(checkpoint__resume_from=str(directory.checkpoint(20)))[1] == [20]


def test_resume_from_a_finished_run_needs_more_updates(directory, tmp_path):
    source = str(directory.checkpoint(20))
    branch = Directory(tmp_path / "branch", steps=())
    message = "step_00000020 has 20 updates already; train.max_steps = 20 is not allowed, it must be more"
    with pytest.raises(SettingsError, match=f"checkpoint.resume_from: .*{message}"):
        branch.start(checkpoint__resume_from=source, train__max_steps=20)
    assert branch.start(checkpoint__resume_from=source, train__max_steps=21)[1] == [20]
    assert directory.start(train__max_steps=20)[1] == [20]  # complete itself


def test_what_resume_from_names_is_blamed_on_it(directory, tmp_path):
    branch = Directory(tmp_path / "branch", steps=())
    source = str(directory.checkpoint(20))
    with pytest.raises(SettingsError, match=r"^checkpoint.resume_from: .* Set another checkpoint.resume_from, restore"):
        branch.start(checkpoint__resume_from=source, seed=5)
    directory.save(30, outputs=5)
    with pytest.raises(SettingsError, match=r"^checkpoint.resume_from: .*step_00000030: bias is \(5,\)"):
        branch.start(checkpoint__resume_from=str(directory.checkpoint(30)))


def test_a_damaged_or_foreign_source_is_refused(directory, tmp_path):
    branch = Directory(tmp_path / "branch", steps=())
    remove(directory.checkpoint(10) / "manifest.json")
    for source in (directory.checkpoint(10), tmp_path / "nothing"):
        with pytest.raises(SettingsError, match=rf"checkpoint.resume_from: {source}/manifest.json"):
            branch.start(checkpoint__resume_from=str(source))
    model = torch.nn.Linear(2, 3)
    foreign = save_checkpoint(tmp_path / "foreign", model, Stacey(model.parameters()), {"step": 3})
    with pytest.raises(SettingsError, match="its manifest has no position and no skipped_steps"):
        branch.start(checkpoint__resume_from=str(foreign))
    with pytest.raises(SettingsError, match="belongs to another run"):
        branch.start(checkpoint__resume_from=str(directory.checkpoint(20)), seed=5)


def test_an_imported_one_has_nothing_to_compare_with(directory, tmp_path, capsys):
    model = torch.nn.Linear(2, 3)
    extra = {"step": 3, "position": 48, "skipped_steps": 0}
    imported = save_checkpoint(tmp_path / "imported", model, Stacey(model.parameters()), extra)
    branch = Directory(tmp_path / "branch", steps=())
    assert branch.start(checkpoint__resume_from=str(imported), seed=9)[0] == Progress(3, 48, 0, evaluated_step=3)
    assert "there are no settings to compare with" in capsys.readouterr().out
    shutil.copytree(imported, branch.checkpoint(3))
    assert branch.start()[0] == Progress(3, 48, 0, evaluated_step=3)
    with pytest.raises(SettingsError, match="did not come from there"):
        branch.start(checkpoint__resume_from=str(imported))
