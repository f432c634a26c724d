"""`stacey-dist prepare`: what a run then finds."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stacey_dist.cli import main
from stacey_dist.training import llm
from stacey_dist.training.command_line import parse
from stacey_dist.training.llm_config import LLMConfig
from tests.training.helpers import write_config


def test_a_run_finds_what_was_prepared(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path)
    assert main(["prepare", "--config", str(config)]) == 0
    directory, *_ = capsys.readouterr().out.splitlines()[-1].partition(": ")
    monkeypatch.setattr(llm, "train_sentencepiece", None)  # nothing is made again
    monkeypatch.setattr(sys.modules["stacey_dist.data.prepare"], "Preparation", None)
    found, _ = llm.tokenize(parse(LLMConfig, ["--config", str(config)]))
    assert str(found) == directory


def test_runs_that_start_together_train_one_tokenizer(tmp_path, monkeypatch):
    config = parse(LLMConfig, ["--config", str(write_config(tmp_path))])
    train, trained = llm.train_sentencepiece, []

    def slowly(*arguments):
        trained.append(arguments)
        time.sleep(0.3)
        return train(*arguments)

    monkeypatch.setattr(llm, "train_sentencepiece", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(llm.tokenize, [config] * 3))
    assert len(trained) == 1
    assert len({tokenizer.fingerprint for _, tokenizer in found}) == 1


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
    for name in ("checkpoint", "bench", "reproduce", "tune", "info", "plan", "prepare"):
        assert re.search(rf"^    {name}\b", said, re.MULTILINE), name
