"""The versions that were tested and what they take on disk: versions.json, and tables of docs/reference/versions.md.

python .ci/versions.py record oldest    # in the environment of .ci/oldest; newest in that of .ci/newest
python .ci/versions.py sizes            # in an environment with the versions of constraints.txt
python .ci/versions.py table            # write the tables
"""

import importlib.metadata
import json
import platform
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
VERSIONS = ROOT / ".ci" / "versions.json"
PAGE = ROOT / "docs" / "reference" / "versions.md"
MARK = "<!-- table: .ci/versions.py -->\n"


def packages() -> dict[str, list[str]]:
    """Return the packages that the library (under "") and each extra for users name."""
    found: dict[str, list[str]] = {}
    for requirement in map(Requirement, importlib.metadata.requires("stacey_dist") or []):
        extra = re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker))
        if requirement.name not in ("stacey_dist", "stacey-dist") and (
            extra is None or extra[1] not in ("test", "docs", "dev")
        ):
            found.setdefault(extra[1] if extra else "", []).append(requirement.name)
    return found


def with_requirements(names: list[str]) -> set[str]:
    """Return the installed packages among these and all that they need."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        extras = [{"extra": extra} for extra in ("", *requirement.extras)]
        needed = requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in extras)
        if name in found or not needed:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        for inner in map(Requirement, requires):
            if inner.marker is None or any(inner.marker.evaluate(extra) for extra in extras):
                waiting.append(Requirement(f"{inner.name}[{','.join(inner.extras)}]"))
    return found


def megabytes(name: str) -> float:
    """Return what the files of an installed package take."""
    files = importlib.metadata.files(name) or []
    return sum(file.size or 0 for file in files) / 1e6


def sizes() -> None:
    """Write into the file what the library and each extra add to torch on disk, in megabytes."""
    known = json.loads(VERSIONS.read_text())
    torch = with_requirements(["torch"])
    library = with_requirements(["numpy", "safetensors"])
    # An editable installation has its files elsewhere.
    own = sum(file.stat().st_size for file in (ROOT / "stacey_dist").rglob("*") if "__pycache__" not in file.parts)
    known["megabytes"] = {
        "stacey_dist": round(own / 1e6, 1),
        **{name: round(megabytes(name), 1) for name in sorted(library - torch)},
    }
    for extra, names in packages().items():
        if extra:
            added = with_requirements(names) - torch - library
            known["megabytes"][extra] = round(sum(map(megabytes, added)), 1)
    write(known)


def write(known: dict[str, dict[str, object]]) -> None:
    """Write the file."""
    VERSIONS.write_text(json.dumps(known, indent=1) + "\n")


def record(which: str) -> None:
    """Write the versions that are installed here into the file, as the oldest or the newest ones that are tested."""
    known = json.loads(VERSIONS.read_text()) if VERSIONS.exists() else {}
    names = [name for group in packages().values() for name in group]
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    known[which] = {"python": platform.python_version(), **installed}
    write(known)


def table() -> str:
    """Return the page's table: a row for each package, with what installs it and both versions."""
    known = json.loads(VERSIONS.read_text())
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    ci = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in constraints.items()}
    lines = ["| package | extra | oldest tested | in CI | newest tested |", "|---|---|---|---|---|"]
    for extra, names in packages().items():
        for name in names:
            oldest, newest = (known.get(which, {}).get(name, "–") for which in ("oldest", "newest"))
            lines.append(f"| {name} | {extra or '(library)'} | {oldest} | {ci[name.lower()]} | {newest} |")
    lines += ["", "| on disk beside torch | MB |", "|---|---|"]
    lines += [f"| {name} | {size} |" for name, size in known.get("megabytes", {}).items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return docs/reference/versions.md with the table as it is to be."""
    before, _, after = PAGE.read_text().split(MARK)
    return f"{before}{MARK}\n{table()}\n{MARK}{after}"


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(sys.argv[2])
    elif sys.argv[1] == "sizes":
        sizes()
    else:
        PAGE.write_text(page())
