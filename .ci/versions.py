"""The versions that were tested, as .ci/versions.json has them, and the table of docs/versions.md made of them.

python .ci/versions.py record oldest    # in the environment of .ci/oldest; newest in that of .ci/newest
python .ci/versions.py table            # write the table
"""

import importlib.metadata
import json
import platform
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ROOT / ".ci" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
MARK = "<!-- table: .ci/versions.py -->\n"


def packages() -> dict[str, list[str]]:
    """Return the packages that the library (under "") and each extra for users name."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("stacey_dist") or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if (
            name
            and name[0] not in ("stacey_dist", "stacey-dist")
            and (extra is None or extra[1] not in ("test", "docs", "dev"))
        ):
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def record(which: str) -> None:
    """Write the versions that are installed here into the file, as the oldest or the newest ones that are tested."""
    known = json.loads(VERSIONS.read_text()) if VERSIONS.exists() else {}
    names = [name for group in packages().values() for name in group]
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    known[which] = {"python": platform.python_version(), **installed}
    VERSIONS.write_text(json.dumps(known, indent=1) + "\n")


def table() -> str:
    """Return the page's table: a row for each package, with what installs it and both versions."""
    known = json.loads(VERSIONS.read_text())
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    ci = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in constraints.items()}
    lines = ["| package | extra | oldest tested | in CI | newest tested |", "|---|---|---|---|---|"]
    for extra, names in packages().items():
        for name in names:
            oldest, newest = known["oldest"].get(name, "–"), known["newest"].get(name, "–")
            lines.append(f"| {name} | {extra or '(library)'} | {oldest} | {ci[name.lower()]} | {newest} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return docs/versions.md with the table as it is to be."""
    before, _, after = PAGE.read_text().split(MARK)
    return f"{before}{MARK}\n{table()}\n{MARK}{after}"


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(sys.argv[2])
    else:
        PAGE.write_text(page())
