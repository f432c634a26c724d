"""What is made of the documentation: `python .ci/pages.py` writes it, and a test holds that it is current.

Tables of measured figures (figures.py), the reference of settings and commands (reference.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `experiments` is not installed

import figures
import reference


def pages() -> dict[Path, str]:
    """Return the text of each file that is made, as it is to be."""
    made = {path: figures.drawn(path.read_text(encoding="utf-8")) for path in figures.PAGES}
    return made | reference.pages()


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
