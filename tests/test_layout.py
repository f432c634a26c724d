"""Imports run one way, as CONTRIBUTING.md draws them: nothing imports what stands above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stacey_dist"
HELPERS = ("version", "errors", "extras", "files", "yaml_files", "cores", "safe_pickle")
ORDER = [HELPERS, ("optim",), ("sharding",), ("checkpoint",), ("models", "data"), ("training",), ("plan",)]
# What the program's commands are made of may import everything.
ABOVE = ("cli", "checkpoint_commands", "bench", "info", "__init__")
LEVEL = {name: level for level, names in enumerate([*ORDER, ABOVE]) for name in names}


def imports(file):
    """Return the names of our modules that a file imports, at its top or where it needs them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in found if name.startswith("stacey_dist."))


def top(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_a_level():
    assert {top(file) for file in PACKAGE.rglob("*.py")} == LEVEL.keys()


@pytest.mark.parametrize("part", [name for name in LEVEL if name not in ABOVE])
def test_imports_run_one_way(part):
    files = [file for file in PACKAGE.rglob("*.py") if top(file) == part]
    wrong = {(file.name, name) for file in files for name in imports(file) if LEVEL[name] > LEVEL[part]}
    assert not wrong
