"""What SECURITY.md promises."""

import ast
import stat
from pathlib import Path

import pytest

from tests.training.helpers import launch, write_config

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "stacey_dist").rglob("*.py")), *sorted(ROOT.glob("train_*.py"))]
# They read other makers' pickles, with a list of harmless classes.
IMPORTERS = ROOT / "stacey_dist" / "checkpoint" / "importers"
READ_PICKLES = {IMPORTERS / "foreign.py", IMPORTERS / "accelerate.py", ROOT / "stacey_dist/data/images/cifar.py"}
RUNS_CODE = {
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
    """(name as it is called, its keyword arguments, line) of every call, and every import."""
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
        if path not in READ_PICKLES:
            assert name not in RUNS_CODE, where
            assert name not in ("torch.load", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load"), where
        if name == "torch.load":
            assert keywords["weights_only"] == "True", where
        if name.endswith((".from_pretrained", ".from_config", "load_dataset")):
            assert keywords.get("trust_remote_code", "False") == "False", where
        if name.endswith("safe_globals"):
            assert path == IMPORTERS / "foreign.py", where


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run under a narrow umask, with secrets in its environment: (directory, what it printed)."""
    directory = tmp_path_factory.mktemp("security")
    config = write_config(directory)
    secrets = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_secretsecretsecret", "WANDB_MODE": "offline"}
    output = launch(
        "--config", config, "--run_dir", directory / "run", "--train.max_steps", 4,
        "--tracking.trackers", "wandb,tensorboard", program="tests/training/with_umask.py", **secrets,
    )  # fmt: skip
    return directory / "run", output, [secrets["WANDB_API_KEY"], secrets["HF_TOKEN"]]


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
