"""The commands of `stacey-dist checkpoint`."""

import json
import math
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, ViTConfig

from stacey_dist import Stacey, checkpoint_commands
from stacey_dist.checkpoint import save_checkpoint
from stacey_dist.checkpoint.manifest import UnknownFormatError
from stacey_dist.cli import main
from stacey_dist.models.export import describe_model
from tests.test_docs import make_batches, tiny_llama


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run directory with checkpoints after 1 and 2 updates, and the model."""
    directory = tmp_path_factory.mktemp("run")
    model = tiny_llama()
    optimizer = Stacey(model.parameters(), lr=0.01)
    for step, batch in enumerate(make_batches(2), start=1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        extra = {"step": step, "engine": "single", "model": describe_model(model), "config": {"seed": 7}}
        save_checkpoint(directory / "checkpoints" / f"step_{step:08d}", model, optimizer, extra)
    return directory, model


def first(run):
    return run[0] / "checkpoints" / "step_00000001"


def second(run):
    return run[0] / "checkpoints" / "step_00000002"


def call(capsys, *arguments):
    status = main(["checkpoint", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_list(run, capsys, below):
    status, out, _ = call(capsys, "list", run[0] / below)
    lines = out.splitlines()
    assert status == 0
    assert [line.split()[0] for line in lines] == [str(second(run)), str(first(run))]
    assert "after 2 updates" in lines[0]
    assert "single, 1 process" in lines[0]


def test_list_of_nothing_and_of_a_damaged_one(tmp_path, capsys):
    assert "no checkpoints under" in call(capsys, "list", tmp_path)[1]
    (tmp_path / "step_00000003").mkdir()
    assert "step_00000003  damaged: " in call(capsys, "list", tmp_path)[1]


def test_a_checkpoint_of_a_newer_version_is_not_called_damaged(run, tmp_path, capsys, monkeypatch):
    def newer(path):
        raise UnknownFormatError(f"{path} has format 9")

    monkeypatch.setattr(checkpoint_commands, "read_manifest", newer)
    assert f"{second(run)}  {second(run)} has format 9\n" in call(capsys, "list", run[0])[1]
    assert call(capsys, "show", second(run)) == (1, "", f"stacey-dist: {second(run)} has format 9\n")


def test_list_of_a_path_that_is_not_there(tmp_path, capsys):
    assert call(capsys, "list", tmp_path / "x") == (2, "", f"stacey-dist: {tmp_path / 'x'} is no directory\n")


@pytest.mark.parametrize("below", ["", "checkpoints"])
@pytest.mark.parametrize("command", ["show", "verify", "diff", "export"])
def test_of_a_run_the_newest_is_taken(run, tmp_path, capsys, command, below):
    path = run[0] / below
    rest = {"diff": [second(run)], "export": [tmp_path / "out"]}.get(command, [])
    status, out, err = call(capsys, command, path, *rest)
    assert status == 0
    assert err.splitlines()[0] == f"the newest of {path}: {second(run)}"
    expected = {"show": "after 2 updates", "verify": f"{second(run)}: ", "diff": "equal", "export": "for transformers"}
    assert expected[command] in out


def test_a_run_without_checkpoints_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SystemExit):
        main(["checkpoint", "show", str(tmp_path)])
    assert f"{tmp_path} is a run without checkpoints" in capsys.readouterr().err


def test_list_finds_runs_below(run, tmp_path, capsys):
    for name in ("b/c", "a", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        os.symlink(run[0] / "checkpoints", tmp_path / name / "checkpoints")
    lines = call(capsys, "list", tmp_path)[1].splitlines()
    shown = [line.split()[0].removeprefix(f"{tmp_path}/") for line in lines]
    steps = [f"checkpoints/step_0000000{i}" for i in (2, 1)]
    assert shown == [f"{name}/{step}" for name in ("a", "b/c") for step in steps]


def test_a_path_that_cannot_be_looked_at_is_one_line(capsys):
    status, _, err = call(capsys, "show", "a" * 300)
    assert status == 1
    assert "File name too long" in err


def test_show(run, capsys):
    status, out, _ = call(capsys, "show", second(run))
    assert status == 0
    assert "after 2 updates" in out
    assert '"seed": 7' in out
    assert f"torch {torch.__version__}" in out


def test_verify(run, tmp_path, capsys):
    assert call(capsys, "verify", first(run))[0] == 0
    model = torch.nn.Linear(2, 2)
    path = save_checkpoint(tmp_path / "step_00000001", model, Stacey(model.parameters()))
    (part,) = path.glob("*.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    status, _, err = call(capsys, "verify", path)
    assert status == 1
    assert f"{part}: its content does not match its checksum" in err
    status, _, err = call(capsys, "verify", tmp_path / "nothing")
    assert status == 1
    assert "manifest.json" in err


def test_diff_of_updates_and_of_a_copy(run, tmp_path, capsys):
    assert call(capsys, "diff", first(run), first(run))[:2] == (0, "equal bit for bit\n")
    status, out, _ = call(capsys, "diff", first(run), second(run))
    assert status == 1
    assert "optimizer/model.norm.weight/step: 1 of 1 elements differ, by 1 at most" in out
    assert "model/lm_head.weight: " in out


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (torch.tensor([0.0, math.nan]), None),
        (torch.tensor([-0.0, math.nan]), "model/a: 1 of 2 elements differ, by 0 at most"),
        (torch.tensor([0.5, 1.0]), "model/a: 2 of 2 elements differ, by 0.5 at most, 1 of them by NaN or infinity"),
        (torch.tensor([0.0, math.nan], dtype=torch.bfloat16), "model/a: (2,) float32 and (2,) bfloat16"),
        (torch.tensor([0.0]), "model/a: (2,) float32 and (1,) float32"),
    ],
)
def test_diff_counts_bits(tmp_path, capsys, value, line):
    paths = []
    for index, tensor in enumerate([torch.tensor([0.0, math.nan]), value]):
        model = torch.nn.Module()
        model.a = torch.nn.Parameter(tensor)
        paths.append(save_checkpoint(tmp_path / f"step_{index}", model, Stacey(model.parameters())))
    status, out, _ = call(capsys, "diff", *paths)
    assert status == (line is not None)
    assert (line or "equal bit for bit") in out


def test_diff_names_what_only_one_has(run, tmp_path, capsys):
    model = torch.nn.Linear(2, 2)
    other = save_checkpoint(tmp_path / "step_00000001", model, Stacey(model.parameters()))
    status, out, _ = call(capsys, "diff", first(run), other)
    assert status == 1
    assert f"model/weight: only in {other}" in out
    assert f"model/lm_head.weight: only in {first(run)}" in out


def test_export(run, tmp_path, capsys):
    assert call(capsys, "export", second(run), tmp_path / "model")[0] == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for (name, a), (other, b) in zip(run[1].named_parameters(), exported.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"
    model = torch.nn.Linear(2, 2)
    path = save_checkpoint(tmp_path / "step_00000001", model, Stacey(model.parameters()))
    status, _, err = call(capsys, "export", path, tmp_path / "other")
    assert status == 2
    assert "it does not name its model: import it again with --model" in err
    (tmp_path / "file").write_text("")
    assert call(capsys, "export", second(run), tmp_path / "file") == (
        2, "", f"stacey-dist: {tmp_path / 'file'} is no directory\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--position", "-1"], "--position -1: it must be at least 0"),
        (["--step", "-3"], "--step -3: it must be at least 0"),
        (["--model", "{d}/none"], "--model {d}/none: "),
        (["--model", "{d}/vit"], "--model {d}/vit: Unrecognized configuration class"),
    ],
)
def test_imports_that_are_asked_for_wrongly(tmp_path, capsys, options, message):
    ViTConfig().save_pretrained(tmp_path / "vit")
    options = [option.format(d=tmp_path) for option in options]
    status, _, err = call(capsys, "import", tmp_path, tmp_path / "out", *options)
    assert status == 2
    assert message.format(d=tmp_path) in err
    assert err.count("\n") == 1


def test_a_directory_that_may_not_be_read_is_not_called_empty(run, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    status, out, err = call(capsys, "list", run[0])
    assert (status, out) == (1, "")
    assert "Permission denied" in err
