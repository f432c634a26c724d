"""`stacey-dist prepare`: what a run then finds."""

import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stacey_dist.cli import main
from stacey_dist.data import encoding
from stacey_dist.training.settings.command_line import parse
from stacey_dist.training.settings.llm_config import LLMConfig
from stacey_dist.training.tasks import text_data
from tests.data.helpers import tree
from tests.training.helpers import launch, write_config


def test_a_run_finds_what_was_prepared(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path)
    assert main(["prepare", "--config", str(config)]) == 0
    directory, *_ = capsys.readouterr().out.splitlines()[-1].partition(": ")
    monkeypatch.setattr(text_data, "train_sentencepiece", None)  # nothing is made again
    monkeypatch.setattr(sys.modules["stacey_dist.data.cache"], "Preparation", None)
    (found,), _ = text_data.tokenize(parse(LLMConfig, ["--config", str(config)]))
    assert str(found) == directory


def test_runs_that_start_together_train_one_tokenizer(tmp_path, monkeypatch):
    config = parse(LLMConfig, ["--config", str(write_config(tmp_path))])
    train, trained = text_data.train_sentencepiece, []

    def slowly(*arguments):
        trained.append(arguments)
        time.sleep(0.3)
        return train(*arguments)

    monkeypatch.setattr(text_data, "train_sentencepiece", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(text_data.tokenize, [config] * 3))
    assert len(trained) == 1
    assert len({tokenizer.fingerprint for _, tokenizer in found}) == 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_damaged_tokens_stop_the_run_and_the_next_start_prepares_them_again(tmp_path, processes):
    config = write_config(tmp_path, train={"max_steps": 2, "eval_every_steps": 2}, schedule={"warmup_steps": 1})
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    assert main(["prepare", *arguments]) == 0
    (part,) = tmp_path.glob("cache/*/train-00000.bin")
    content = part.read_bytes()
    flip(part)
    output = launch(*arguments, processes=processes, expect=2)
    assert output.count(f"train_llm.py: error: {part} does not hold what was written") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    output = launch(*arguments, processes=processes)
    assert output.count(f"{part} is missing: preparing it again") == 1
    assert part.read_bytes() == content


def test_prepare_prepares_damaged_tokens_again(tmp_path, capsys):
    arguments = ["prepare", "--config", str(write_config(tmp_path))]
    assert main(arguments) == 0
    (part,) = tmp_path.glob("cache/*/validation-00000.bin")
    content = part.read_bytes()
    flip(part)
    assert main(arguments) == 0
    assert f"{part} does not hold what was written: preparing it again" in capsys.readouterr().err
    assert part.read_bytes() == content


def test_bad_records_are_one_line_or_are_skipped(tmp_path, capsys):
    file = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": f"document {i} of words"}) for i in range(200)]
    rows[150] = '{"text": "x", "id": ' + "7" * 5000 + "}"
    file.write_text("\n".join(rows))
    arguments = ["prepare", "--data.files", str(file), "--data.cache_dir", str(tmp_path / "cache")]
    arguments += ["--tokenizer.vocab_size", "290"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"stacey-dist prepare: error: {file}, line 151: not one JSON object a line (Exceeds")
    assert main([*arguments, "--data.on_bad_record", "skip"]) == 0
    captured = capsys.readouterr()
    assert f"data.on_bad_record skip: 1 bad records were left out; {file}, line 151: " in captured.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["run[1]", "x::y", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("a*b", "with space"))]
)
def test_a_run_in_a_folder_that_looks_like_a_pattern(tmp_path, name):
    """All paths of it, beside a folder that the pattern would match; then it goes on from its checkpoint."""
    decoy = tmp_path / {"run[1]": "run1", "a*b": "aXb", "x::y": "x", "with space": "with"}[name]
    config = write_config(tmp_path, train={"max_steps": 2, "eval_every_steps": 2}, schedule={"warmup_steps": 1})
    for folder in (tmp_path / name, decoy):
        folder.mkdir()
        shutil.copy(tmp_path / "text.txt", folder)
    with open(decoy / "text.txt", "a") as file:
        file.write("decoy " * 3000)
    paths = [f"--data.files={tmp_path / name}/*.txt", f"--data.cache_dir={tmp_path / name}/cache"]
    launch("--config", str(config), *paths, "--run_dir", str(tmp_path / name / "run"))
    assert sorted(path.name for path in decoy.iterdir()) == ["text.txt"]
    (index,) = (tmp_path / name / "cache").rglob("index.json")
    assert json.loads(index.read_text())["source"]["files"][0]["path"] == str(tmp_path / name / "text.txt")
    checkpoint = tmp_path / name / "run" / "checkpoints" / "step_00000002"
    branch = [f"--checkpoint.resume_from={checkpoint}", "--train.max_steps=3", f"--run_dir={tmp_path / name / 'more'}"]
    output = launch("--config", str(config), *paths, *branch)
    assert f"resumed from {checkpoint} after 2 updates" in output


def test_without_a_cache_it_is_in_the_directory_of_the_run(tmp_path, capsys):
    config = write_config(tmp_path, data={"cache_dir": None})
    assert main(["prepare", "--config", str(config), "--run_dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(str(tmp_path / "run" / "data"))


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--data.files", "nope.txt", "data.files: 'nope.txt' matches no file"),
        ("--data.sequence_length", "0", "data.sequence_length: 0 is not allowed"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, option, value, complaint):
    assert main(["prepare", "--config", str(write_config(tmp_path)), option, value]) == 2
    assert capsys.readouterr().err.startswith(f"stacey-dist prepare: error: {complaint}")


def test_mistyped_options_name_the_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--data.cache_di", "x"])
    assert stopped.value.code == 2
    expected = "stacey-dist prepare: error: unknown option --data.cache_di; did you mean --data.cache_dir?"
    assert capsys.readouterr().err.splitlines()[0] == expected


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name in ("checkpoint", "bench", "info", "plan", "prepare"):
        assert re.search(rf"^    {name}\b", said, re.MULTILINE), name


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (["--workers", "0"], "workers: 0 is not allowed; it must be at least 1"),
        (["--shard", "2/2"], "shard: 2/2 is not allowed; it must be one of 0/2 and so on"),
        (["--shard", "x"], "shard: 'x' is not allowed; it must be I/N"),
    ],
)
def test_bad_workers_are_one_line(tmp_path, capsys, option, complaint):
    assert main(["prepare", "--config", str(write_config(tmp_path)), *option]) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_workers_of_slurms_tasks_make_what_one_process_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_GROUP_BYTES", 1000)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"some words of file {i}\n\n" * 600)
    arguments = ["prepare", "--data.files", f"{tmp_path}/*.txt", "--data.validation_every", "3"]
    arguments += ["--tokenizer.vocab_size", "290"]
    arguments += ["--data.cache_dir", str(tmp_path / "cache")]
    assert main([*arguments, "--workers", "1"]) == 0
    (index,) = tmp_path.glob("cache/*/index.json")
    alone = tree(index.parent)
    shutil.rmtree(index.parent)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert main([*arguments, "--workers", "2"]) == 0
    assert tree(index.parent) == alone
