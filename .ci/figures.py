"""The measured figures of the documentation: docs/figures.json holds them, and the pages draw tables from it.

    python .ci/figures.py        write the tables into the pages

A page says where a table belongs, and `tests/test_pages.py` holds that it is current:

    <!-- figures: NAME -->
    ...
    <!-- end -->
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKED = re.compile(r"^<!-- figures: (\S+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def tables() -> dict[str, list[list[str]]]:
    """Return the rows of each table, the header first."""
    read: dict[str, list[list[str]]] = json.loads((ROOT / "docs" / "figures.json").read_text(encoding="utf-8"))
    return read


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header.replace("|  |", "| |"), "|" + "---|" * len(rows[0]), *body])


def drawn(page: str) -> str:
    """Return a page with its tables as they are to be."""
    known = tables()
    return MARKED.sub(lambda m: f"<!-- figures: {m[1]} -->\n\n{markdown(known[m[1]])}\n\n<!-- end -->", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(drawn(path.read_text(encoding="utf-8")), encoding="utf-8")
