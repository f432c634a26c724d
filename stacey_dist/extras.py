"""Find the extra that installs a missing package, so that an error can name it."""

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Modules that are named otherwise than their packages.
_PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf"}
_REQUIREMENT = re.compile(r"""([\w.-]+).*;.*\bextra\s*==\s*["']([\w-]+)["']""")
# Extras that contain others: the narrowest is named.
_COLLECTIONS = ("test", "dev", "docs")


def is_installed(module: str) -> bool:
    """Return whether a top-level module can be imported. Nothing is imported."""
    return importlib.util.find_spec(module) is not None


def install_line(module: str) -> str | None:
    """Return the command that installs a missing module, or None if no extra of stacey_dist has it."""
    top_level = module.partition(".")[0]
    package = _normalized(_PACKAGES.get(top_level, top_level))
    for requirement in importlib.metadata.requires("stacey_dist") or []:
        match = _REQUIREMENT.match(requirement)
        if match and _normalized(match[1]) == package and match[2] not in _COLLECTIONS:
            return f"pip install 'stacey_dist[{match[2]}]'"
    return None


def describe_missing(error: ModuleNotFoundError, extra: str | None = None) -> str | None:
    """Return the line to print for an import that failed, or None if no extra installs the module.

    `extra` is named if it is given: a command of one extra may need modules of another that it contains.
    """
    line = install_line(error.name or "")
    if line is not None and extra is not None:
        line = f"pip install 'stacey_dist[{extra}]'"
    return None if line is None else f"{error.name} is not installed; {line}"


@contextmanager
def missing_extras_reported(program: str) -> Iterator[None]:
    """End the program with status 2 and one line where a module of an extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (line := describe_missing(error)) is None:
            raise
        print(f"{program}: {line}", file=sys.stderr)
        sys.exit(2)


def _normalized(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
