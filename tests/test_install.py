"""Installing: what the wheel and the sdist contain, and the library beside torch, numpy and safetensors alone."""

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from stacey_dist import extras
from stacey_dist.cli import main
from tests.shared import made_once

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = ["torch", "numpy", "safetensors"]
TEST_TOOLS = ["pytest", "hypothesis", "pytest-timeout", "pytest-xdist", "psutil", "expecttest"]


def run(*command, **options):
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def without_the_source_tree():
    """Return the environment for programs that are to find what is installed; uv does not read pip's own settings."""
    variables = {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""), **os.environ}
    own = ("PYTHONPATH", "VIRTUAL_ENV", "SHARED_BY_WORKERS")
    return {name: value for name, value in variables.items() if name not in own and not name.startswith("PYTEST_")}


def copy_the_tests(*names, to):
    """Tests without the source tree run what is installed."""
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, to / name)


def build(out):
    run(sys.executable, "-m", "build", "--installer", "uv", "--outdir", out, ROOT, env=without_the_source_tree())
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def built():
    """Return (sdist, wheel): the wheel is built from the sdist, in an environment of its own."""
    return made_once(build)


def install(directory, *requirements):
    """Make a virtual environment with packages in the versions of constraints.txt; return its bin directory."""
    run("uv", "venv", "--clear", "--python", sys.executable, directory)
    constrained = ["uv", "pip", "install", "--python", directory, "-c", ROOT / "constraints.txt"]
    run(*constrained, *requirements, env=without_the_source_tree())
    run("uv", "pip", "check", "--python", directory)
    copy_compiled_files(next(directory.glob("lib/python*/site-packages")))
    return directory / "bin"


def copy_compiled_files(there):
    """Give an environment this one's compiled files, which Python takes where the sources are the same.

    uv installs none, and the first import of torch compiles for ten seconds.
    """
    here = Path(sysconfig.get_path("purelib"))
    for package in there.iterdir():
        for compiled in (here / package.name).rglob("__pycache__"):
            target = there / compiled.relative_to(here)
            if target.parent.is_dir():
                shutil.copytree(compiled, target, dirs_exist_ok=True)


@pytest.mark.slow
def test_the_wheel_serves_every_python_and_has_the_kernels(built):
    wheel = zipfile.ZipFile(built[1])
    assert re.search(r"-py3-none-\w*linux\w*\.whl$", built[1].name)
    names = wheel.namelist()
    libraries = {Path(name).name for name in names if name.endswith(".so")}
    assert "_cpu_portable.so" in libraries
    assert libraries <= {"_cpu_portable.so", "_cpu_avx2.so", "_cpu_avx512.so"}
    assert "stacey_dist/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"stacey_dist"}, "nothing beside the package"
    assert sum(entry.file_size for entry in wheel.infolist()) < 5_000_000
    (metadata,) = [wheel.read(name) for name in names if name.endswith(".dist-info/METADATA")]
    requirements = email.message_from_bytes(metadata).get_all("Requires-Dist")
    needed = [text for text in requirements if "extra ==" not in text]
    assert [re.match(r"[\w-]+", text)[0] for text in needed] == CORE
    assert not [text for text in needed if "<" in text or "==" in text], "no upper bounds"


@pytest.mark.slow
def test_the_sdist_has_what_builds_and_tests_it_and_nothing_else(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for file in ("setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "CITATION.cff", "train_llm.py"):
        assert file in names
    for file in ("stacey_dist/optim/kernels/cpu.cpp", "tests/optim/oracle.py", "experiments/registry.py"):
        assert file in names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".png"))]
    tops = {name.split("/")[0] for name in names if name}
    assert not tops & {"docs", "docker", "benchmarks", "build", ".ci", ".github"}


@pytest.fixture(scope="module")
def library_alone(built):
    """Return the bin directory of an environment with the wheel, what it needs, and what its tests need."""
    return made_once(install, str(built[1]), *TEST_TOOLS)


CORE_TESTS = ("tests/optim", "tests/sharding", "tests/checkpoint")


@pytest.mark.exhaustive
def test_the_library_runs_where_only_torch_numpy_and_safetensors_are(library_alone, tmp_path):
    listed = run("uv", "pip", "freeze", "--python", library_alone / "python")
    installed = {line.split("==")[0].lower() for line in listed.splitlines()}
    assert not installed & {"transformers", "accelerate", "datasets", "matplotlib", "pyyaml", "deepspeed"}
    assert "stacey_dist 0." in run(library_alone / "stacey-dist", "--version")
    assert "kernel on cpu: C++" in run(library_alone / "stacey-dist", "info", cwd=tmp_path)
    commands, experiments = [library_alone / "stacey-dist"], [library_alone / "python", "-m", "experiments"]
    for command, extra in (
        ([*commands, "plan"], "train"),
        ([*commands, "prepare"], "train"),
        ([*experiments, "reproduce", "list"], "experiments"),
    ):
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 2
        assert re.search(rf"is not installed; pip install 'stacey_dist\[{extra}\]'$", result.stderr.strip())
        assert result.stderr.count("\n") == 1


@pytest.mark.exhaustive
def test_the_librarys_tests_pass_there(library_alone, tmp_path):
    copy_the_tests("tests", "configs", "benchmarks", "pyproject.toml", to=tmp_path)
    program = (library_alone / "pytest", "--core", "-q", "-m", "not slow and not exhaustive", "-n", "0")
    there = {"cwd": tmp_path, "env": without_the_source_tree()}
    # All are collected: none of them imports what an extra installs.
    output = run(*program, *CORE_TESTS, **there)
    passed = int(re.search(r"(\d+) passed", output)[1])
    assert passed > 500, output[-2000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("extra", "tests"),
    [
        ("train", ["tests/training/test_quickstart.py", "tests/training/test_images.py::test_quickstart"]),
        ("train,deepspeed", ["tests/training/test_engines.py", "-k", "trains_as_one_process"]),
    ],
)
def test_an_extra_runs_its_launchers(built, tmp_path, extra, tests):
    programs = install(tmp_path / "environment", f"{built[1]}[{extra}]", *TEST_TOOLS)
    copy_the_tests("tests", "configs", "train_llm.py", "train_imagenet.py", "pyproject.toml", to=tmp_path)
    run(programs / "pytest", "-n", "0", *tests, cwd=tmp_path, env=without_the_source_tree())


def test_a_missing_package_is_named_with_the_extra_that_has_it():
    assert extras.install_line("yaml") == "pip install 'stacey_dist[train]'"
    assert extras.install_line("lion_pytorch") == "pip install 'stacey_dist[train]'"
    assert extras.install_line("deepspeed.ops") == "pip install 'stacey_dist[deepspeed]'"
    assert extras.install_line("optuna") == "pip install 'stacey_dist[experiments]'"
    assert extras.install_line("nothing_of_ours") is None


def test_a_tracker_that_is_not_installed_is_refused_at_the_start(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    assert main(["prepare", "--tracking.trackers", "[wandb]"]) == 2
    error = capsys.readouterr().err
    assert "tracking.trackers: wandb is not allowed; wandb is not installed; pip install 'stacey_dist[wandb]'" in error


def test_importing_the_library_imports_none_of_the_extras():
    heavy = "transformers accelerate datasets matplotlib yaml jsonargparse deepspeed scipy optuna wandb PIL pyarrow"
    code = (
        "import sys, stacey_dist, stacey_dist.optim, stacey_dist.sharding, stacey_dist.checkpoint, stacey_dist.cli\n"
        "import stacey_dist.checkpoint.importers, stacey_dist.info, stacey_dist.bench.command\n"
        f"print(sorted(set({heavy.split()!r}) & sys.modules.keys()))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"


def test_constraints_hold_every_package_that_the_project_names():
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    named = [*PROJECT["dependencies"], *(text for group in PROJECT["optional-dependencies"].values() for text in group)]
    for text in named:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower()
        assert name in pinned or name == "stacey-dist", text


def test_the_table_of_versions_is_up_to_date():
    spec = importlib.util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    assert (ROOT / "docs" / "reference" / "versions.md").read_text() == versions.page()
