"""What SECURITY.md promises."""

import ast
import json
import pickle
import re
import stat
from pathlib import Path

import pytest

from experiments.sweep import read_sweep
from stacey_dist.data import hub_source
from stacey_dist.data.parts import INDEX, read_index
from stacey_dist.data.tokenizer import load_pretrained
from stacey_dist.errors import InputError, SettingsError
from tests.shared import made_once
from tests.training.helpers import launch, write_config

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(file for package in ("stacey_dist", "experiments") for file in sorted((ROOT / package).rglob("*.py"))),
    *sorted(ROOT.glob("train_*.py")),
]
# Reads other makers' pickles, with a list of harmless classes.
READS_PICKLES = ROOT / "stacey_dist/safe_pickle.py"
RUNS_CODE = {
    "input",
    "os.popen",
    "os.system",
    "runpy.run_path",
    "eval",
    "exec",
    "compile",
    "import pickle",
    "import dill",
    "import marshal",
    "import shelve",
    "import joblib",
}


def calls(path):
    """Return (name as it is called, its keyword arguments, line) of every call, and every import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno
        elif isinstance(node, ast.Import):
            yield from ((f"import {alias.name}", {}, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"import {node.module}", {}, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_loaded_from_data_or_checkpoints(path):
    for name, keywords, line in calls(path):
        where = f"{path}:{line}: {name}"
        assert not name.startswith(("pickle.load", "pickle.Unpickler")), where  # those of its subclasses are let in
        if path != READS_PICKLES:
            assert name not in RUNS_CODE, where
        # These unpickle, or build whatever a file names.
        assert name not in ("torch.load", "yaml.load", "yaml.unsafe_load"), where
        assert name not in ("numpy.load", "np.load") or keywords.get("allow_pickle") == "False", where
        assert not name.startswith("import torch.distributed.checkpoint"), where
        assert not name.endswith(("safe_globals", "get_class_from_dynamic_module")), where
        assert keywords.get("shell", "False") == "False", where
        if name.endswith((".from_pretrained", ".from_config")):
            assert keywords.get("trust_remote_code") == "False", where  # without it transformers asks
        if name.endswith("load_dataset"):
            assert "trust_remote_code" not in keywords, where  # scripts are no longer known to `datasets`


def test_the_tests_that_are_named_are_there():
    text = (ROOT / "SECURITY.md").read_text()
    for row in re.findall(r"^(?:\|.*\||- .*(?:\n  .*)*)$", text, re.MULTILINE):
        folder = None
        for name in re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py)`", row):
            folder = (ROOT / name).parent if "/" in name else folder
            assert (folder / Path(name).name).is_file(), (name, row)


@pytest.fixture
def trap(monkeypatch, tmp_path):
    """Code that makes a file if it is run, and the file; a question ends the test."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    marker = tmp_path / "ran"
    return f"open({str(marker)!r}, 'w').close()\n", marker


def test_code_beside_a_tokenizer_is_not_run(tmp_path, trap):
    code, marker = trap
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "code.py").write_text(code + "class Theirs: pass\n")
    auto_map = {"AutoTokenizer": ["code.Theirs", "code.Theirs"], "AutoConfig": "code.Theirs"}
    for name in ("config.json", "tokenizer_config.json"):
        content = {"model_type": "theirs", "tokenizer_class": "Theirs", "auto_map": auto_map}
        (directory / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"name_or_directory: "):
        load_pretrained(str(directory))
    assert not marker.exists()


def test_a_script_in_the_place_of_a_dataset_is_not_run(tmp_path, trap):
    code, marker = trap
    directory = tmp_path / "theirs"
    directory.mkdir()
    (directory / "theirs.py").write_text(code)
    for dataset in (directory, directory / "theirs.py"):
        with pytest.raises(InputError, match="cannot be loaded"):
            list(hub_source(str(dataset), None, "train", None, "text", streaming=True).documents())
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", ["!!python/object/apply:os.system ['touch {marker}']", "!!python/name:os.system", "!!python/module:os"]
)
def test_a_sweep_file_names_no_code(tmp_path, trap, content):
    _, marker = trap
    file = tmp_path / "sweep.yaml"
    file.write_text("program: " + content.format(marker=marker))
    with pytest.raises(SettingsError, match="is not allowed"):
        read_sweep(file)
    assert not marker.exists()


def test_an_index_of_tokens_names_no_code(tmp_path, trap):
    code, marker = trap
    for content in (code.encode(), pickle.dumps({"format": 1})):
        (tmp_path / INDEX).write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            read_index(tmp_path)
    assert not marker.exists()


def train_with_secrets(directory):
    config = write_config(directory)
    secrets = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_secretsecretsecret", "WANDB_MODE": "offline"}
    output = launch(
        "--config", config, "--run_dir", directory / "run", "--train.max_steps", 4,
        "--tracking.trackers", "wandb,tensorboard", program="tests/training/with_umask.py", **secrets,
    )  # fmt: skip
    return directory / "run", output, [secrets["WANDB_API_KEY"], secrets["HF_TOKEN"]]


@pytest.fixture(scope="module")
def run():
    """Return a run under a narrow umask, with secrets in its environment: (directory, what it printed, the secrets)."""
    return made_once(train_with_secrets)


@pytest.mark.slow
def test_no_secret_is_written_or_printed(run):
    directory, output, secrets = run
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {"config.yaml", "manifest.json", "metrics.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for secret in secrets:
        assert secret not in output
        for path in files:
            assert secret.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_run_directory_has_the_users_umask(run):
    directory, _, _ = run
    theirs = directory / "wandb"  # wandb makes its own as it likes
    for path in [directory, *directory.rglob("*")]:
        if path.is_symlink() or theirs in path.parents:
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o027 == 0, (path, oct(mode))
        assert mode & 0o640 == 0o640, (path, oct(mode))
