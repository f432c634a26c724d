"""Every block of commands in the documentation runs in a test, or says what it needs; all its options exist."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from stacey_dist import cli
from stacey_dist.training import image_config, llm_config
from stacey_dist.training.command_line import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"gpu", "hub", "files", "slurm", "docker", "machines"}
LAUNCHERS = {
    "train_llm.py": (llm_config.LLMConfig, llm_config.validate),
    "train_imagenet.py": (image_config.ImageConfig, image_config.validate),
}


def find_blocks():
    """(marker, commands) of each block, by page and line."""
    for page in PAGES:
        lines = page.read_text().splitlines()
        for start, line in enumerate(lines):
            if line == "```bash":
                end = lines.index("```", start)
                joined = "\n".join(lines[start + 1 : end]).replace("\\\n", " ")
                yield pytest.param(lines[start - 1], joined, id=f"{page.name}:{start + 1}")


BLOCKS = list(find_blocks())


def commands(block, program):
    """The arguments of each command of the block that has this word, after it."""
    for line in block.splitlines():
        for command in re.split(r"&&|;", line):
            words = shlex.split(command, comments=True)
            if program in words:
                yield words[: words.index(program)], words[words.index(program) + 1 :]


@pytest.mark.parametrize(("marker", "block"), BLOCKS)
def test_a_block_is_tested_or_says_what_it_needs(marker, block):
    if marker == "<!-- tests -->":  # what CI runs
        return
    found = re.fullmatch(r"<!-- (runs|runs: ([\w/]+\.py)(?:::(\w+))?|needs: ([\w, ]+)) -->", marker)
    assert found, f"no marker above the block, but {marker!r}"
    kind, path, test, needs = found.groups()
    if needs:
        assert set(needs.split(", ")) <= NEEDS
    elif path:
        source = (ROOT / path).read_text()
        assert test is None or f"def {test}(" in source
        assert "launch(" in source or "ACCELERATE" in source or "main(" in source
    else:
        assert kind == "runs"


@pytest.mark.parametrize(("marker", "block"), BLOCKS)
def test_launchers_take_the_options(monkeypatch, marker, block):
    monkeypatch.chdir(ROOT)
    for program, (config, validate) in LAUNCHERS.items():
        for before, options in commands(block, program):
            assert before[:2] == ["accelerate", "launch"]
            for option, value in itertools.pairwise(before):
                assert option != "--config_file" or (ROOT / value).is_file()
            if options == ["--help"]:
                continue
            if options[:2] == ["--config", "my.yaml"]:  # the reader's own
                del options[:2]
            validate(parse(config, options))


@pytest.mark.parametrize(("marker", "block"), BLOCKS)
def test_the_tools_take_the_options(monkeypatch, capsys, marker, block):
    monkeypatch.chdir(ROOT)
    if marker != "<!-- runs -->":
        for name in ("list_checkpoints", "show", "verify_checkpoint", "diff", "export", "import_foreign", "measure"):
            monkeypatch.setattr(cli, name, lambda *arguments: 0)
    for _, arguments in commands(block, "stacey-dist"):
        assert cli.main(arguments) == 0
        assert marker != "<!-- runs -->" or capsys.readouterr().out


def test_there_are_commands_of_each_kind():
    assert sum(1 for block in BLOCKS for _ in commands(block.values[1], "train_llm.py")) >= 6
    assert sum(1 for block in BLOCKS for _ in commands(block.values[1], "train_imagenet.py")) >= 6
    assert sum(1 for block in BLOCKS for _ in commands(block.values[1], "stacey-dist")) >= 10
