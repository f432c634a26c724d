"""The measured figures of the documentation: docs/figures.json holds them, and the pages draw tables from it.

A page says where a table belongs:

    <!-- figures: NAME -->
    ...
    <!-- end -->
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKED = re.compile(r"^<!-- figures: (\S+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def tables() -> dict[str, list[list[str]]]:
    """Return the rows of each table, the header first. A table may be some columns of another."""
    read: dict[str, Any] = json.loads((ROOT / "docs" / "figures.json").read_text(encoding="utf-8"))
    whole = {name: table for name, table in read.items() if isinstance(table, list)}
    parts = {name: table for name, table in read.items() if name not in whole}
    return whole | {
        name: [[row[i] for i in part["columns"]] for row in whole[part["of"]]] for name, part in parts.items()
    }


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    header, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def drawn(page: str) -> str:
    """Return a page with its tables as they are to be."""
    known = tables()
    return MARKED.sub(lambda m: f"<!-- figures: {m[1]} -->\n\n{markdown(known[m[1]])}\n\n<!-- end -->", page)
