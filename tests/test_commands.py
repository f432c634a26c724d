"""The commands of the documentation can be typed: files, programs, options and settings are what they say.

A block of commands says on the line above it who runs it:

    <!-- runs -->                                   this test does, as it stands
    <!-- runs: tests/test_x.py::test_name, ... -->  those tests start these programs
    <!-- needs: gpu, hub -->                        nobody does, for want of these
    <!-- tests -->                                  .ci/run does

Whatever it says, the options of every command are parsed by the program's own parser.
"""

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from experiments import __main__ as experiments
from experiments.sweep import read_sweep
from stacey_dist.cli import main, make_parser
from stacey_dist.errors import SettingsError
from stacey_dist.plan.command import plan
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.training.prepare_command import own_options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {"gpu", "hub", "slurm", "docker", "files", "machines"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def blocks(text):
    """Return (marker or None, commands) of each block."""
    for match in re.finditer(r"(?:^<!-- ([^\n]*) -->\n)?^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def commands(block):
    """Return the words of each command, without comments, assignments and `&&`; lines are joined, variables are 0."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, "&&"]:
            if word in ("&&", ";", "|"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(re.sub(r"\$\w+", "0", word))


def existing(path):
    assert (ROOT / path).exists(), f"{path} does not exist"
    return ROOT / path


def check_settings(launcher, options):
    """Assert that the launcher takes these options."""
    if "--help" in options:
        with pytest.raises(SystemExit) as end:
            LAUNCHERS[launcher].parse(options)
        assert end.value.code == 0
    else:
        LAUNCHERS[launcher].parse(options)


def check_script(script, options):
    assert existing(script).suffix == ".py"
    if script in LAUNCHERS:
        check_settings(script, options)


def check(words):
    """Raise unless the program, its files and its options are what they should be."""
    program, *rest = words
    if program == "accelerate":
        assert rest[0] == "launch"
        launch = launch_command_parser().parse_args(rest[1:])
        if launch.config_file:
            existing(launch.config_file)
        if launch.training_script != "...":
            check_script(launch.training_script, launch.training_script_args)
    elif program == "stacey-dist" and rest[:1] == ["plan"] and "--help" not in rest:
        assert plan(rest[1:])
    elif program == "stacey-dist" and rest[:1] == ["prepare"]:
        check_settings("train_llm.py", own_options().parse_known_args(rest[1:])[1])
    elif program == "stacey-dist":
        if "--help" not in rest:
            make_parser().parse_args(rest)
        else:
            with pytest.raises(SystemExit) as end:
                main(rest)
            assert end.value.code == 0
    elif program == "sbatch":
        at = next(i for i, word in enumerate(rest) if word.endswith(".sbatch"))
        existing(rest[at])
        check_settings(Path(rest[at]).with_suffix(".py").name, rest[at + 1 :])
    elif program == "docker":
        for option, value in pairwise(rest):
            if option == "-f":
                existing(value)
        if "accelerate" in rest:
            check(rest[rest.index("accelerate") :])
    elif program == "wandb":
        assert rest[0] in ("sweep", "agent")
        if rest[0] == "sweep":
            read_sweep(existing(rest[1]))
    elif program == "python" and rest[:2] == ["-m", "experiments"]:
        experiments.make_parser().parse_args(rest[2:])
    elif program in ("python", "python3") and rest[0] == "-m":
        assert rest[1] in ("venv", "pytest")
    elif program in ("python", "python3"):
        check_script(rest[0], rest[1:])
    elif program == "pip":
        assert rest[0] == "install"
        for extra in re.findall(r"(?:\.|stacey_dist)\[(.*?)\]", " ".join(rest)):
            assert set(extra.split(",")) <= EXTRAS.keys(), f"there is no extra {extra}"
    else:
        assert program in (".", "pytest", "mkdocs", "hf", "lm_eval"), f"nothing is known of {program}"


def program_of(words):
    """Return what a test that runs the command has to mention: a script, or a subcommand; None for setting up."""
    scripts = [word for word in words if re.search(r"\btrain_\w+\.(py|sbatch)$", word)]
    if scripts:
        return Path(scripts[0]).name
    if words[:3] == ["python", "-m", "experiments"]:
        return words[3]
    return [word for word in words[1:3] if word.isalpha() and word.islower()][-1] if words[0] == "stacey-dist" else None


def check_marker(marker, block):
    assert marker is not None, "no marker"
    kind, _, value = marker.partition(": ")
    names = value.split(", ")
    if kind == "needs":
        assert set(names) <= NEEDS
    elif kind == "runs" and value:
        text = ""
        for path, name in (test.split("::") for test in names):
            source = existing(path).read_text()
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path} has no {name}"
            text += source
            for module in re.findall(r"^from (tests\.\S+) import", source, re.MULTILINE):
                text += existing(f"{module.replace('.', '/')}.py").read_text()
        for program in filter(None, map(program_of, commands(block))):
            assert re.search(rf"\b{re.escape(program)}\b", text), f"{value} do not mention {program}"
    elif kind == "tests":
        assert f"/^<!-- {marker} -->$/" in (ROOT / ".ci" / "run").read_text()
    else:
        assert marker == "runs", f"unknown marker {marker}"


CASES = [
    pytest.param(marker, block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (marker, block) in enumerate(blocks(page.read_text()), 1)
]


@pytest.fixture
def complaint(monkeypatch, capsys):
    """Return what is wrong with a block, or an empty text."""

    def find(marker, block):
        try:
            check_marker(marker, block)
            for words in commands(block):
                check(words)
        except SystemExit as end:
            return f"status {end.code}: {capsys.readouterr().err}"
        except (AssertionError, SettingsError) as error:
            return str(error)
        return ""

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["program"])
    return find


@pytest.mark.parametrize(("marker", "block"), CASES)
def test_a_block_can_be_typed(marker, block, complaint, capsys):
    assert complaint(marker, block) == ""
    if marker == "runs":  # in this process, which has already imported what a new one would import for seconds
        for words in commands(block):
            capsys.readouterr()
            assert status(words) == 0
            assert capsys.readouterr().out


def status(words):
    try:
        if words[:3] == ["python", "-m", "experiments"]:
            return experiments.main(words[3:])
        assert words[0] == "stacey-dist"
        return main(words[1:])
    except SystemExit as end:  # --help
        return end.code


def test_no_block_is_overlooked():
    text = "".join(page.read_text() for page in PAGES)
    assert len(CASES) == len(re.findall(r"^ *(?:```|~~~) ?(?:bash|sh|shell|console)\b", text, re.MULTILINE)) > 8


def test_quoted_code_is_the_code():
    text = "".join(page.read_text() for page in PAGES)
    quotes = re.findall(r"^<!-- from: (\S+) -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(quotes) >= 5
    for path, quote in quotes:
        lines = existing(path).read_text().splitlines()
        for line in quote.splitlines():
            assert line in lines, line


INFO = "tests/test_tools.py::test_info_names_versions_and_the_kernel_or_what_it_lacks"


@pytest.mark.parametrize(
    ("marker", "command", "expected"),
    [
        (None, "stacey-dist info", "no marker"),
        ("needs: luck", "stacey-dist info", "luck"),
        ("run", "stacey-dist info", "unknown marker run"),
        ("runs: tests/none.py::test_nothing", "stacey-dist info", "tests/none.py does not exist"),
        ("runs: tests/test_tools.py::test_nothing", "stacey-dist info", "has no test_nothing"),
        (f"runs: {INFO}", "stacey-dist plan", "do not mention plan"),
        ("needs: gpu", "accelerate launch train_llm.py --optimizer.lrr 1", "did you mean --optimizer.lr?"),
        ("needs: gpu", "accelerate launch train_llm.py --optimizer.tau 2", "it must be within [0, 1]"),
        ("needs: gpu", "accelerate launch train_imagenet.py --config configs/imagenet/none.yaml", "cannot be read"),
        ("needs: gpu", "accelerate launch --config_file configs/none.yaml train_llm.py", "configs/none.yaml does not"),
        ("needs: gpu", "accelerate launch --num_process_count=2 train_llm.py", "num_process_count"),
        ("needs: gpu", "accelerate launch train_none.py", "train_none.py does not exist"),
        ("needs: gpu", "pip install . && accelerate launch \\\n  train_llm.py --train.steps 3", "--train.steps"),
        ("needs: slurm", "A=b sbatch --nodes 2 configs/slurm/train_llm.sbatch --optimizer.p 1", "optimizer.p: 1"),
        ("needs: docker", "docker build -f docker/None .", "docker/None does not exist"),
        ("needs: files", "stacey-dist checkpoint verfy PATH", "verfy"),
        ("needs: files", "stacey-dist bench --case none", "invalid choice: 'none'"),
        ("needs: files", "stacey-dist plan --engine none", "none is not known"),
        ("needs: files", "pip install '.[none]'", "no extra none"),
        ("needs: files", "unheard-of", "nothing is known of unheard-of"),
    ],
)
def test_a_mistake_is_found(marker, command, expected, complaint):
    assert expected in complaint(marker, f"{command}\n")
