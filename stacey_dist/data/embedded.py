"""The default text: the documentation in the Python standard library."""

import ast
import os
import sysconfig
import tokenize
from collections.abc import Generator, Iterator
from pathlib import Path

from stacey_dist.data.text import Document
from stacey_dist.errors import InputError

EXTRACTOR_VERSION = 1
"""To be raised when the extracted text changes, so that caches of the old text are not used for the new."""

# Tests, and packages that are tables, machine-made or not always installed: noise, or text that varies by
# system.
_SKIPPED = {
    *("test", "tests", "idle_test", "idlelib", "turtledemo", "ensurepip", "lib2to3"),
    *("encodings", "pydoc_data", "lib-dynload", "__pycache__", "site-packages", "dist-packages"),
}
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def standard_library_documents() -> Generator[Document, None, None]:
    """Yield about 3 MB of English: ``pydoc_data.topics`` and the standard library's docstrings and comments.

    One document a help topic, then one a module, in the order of their names: the same for one Python version
    on every machine with a complete standard library. Modules are parsed, never imported.

    Raises:
        InputError: this Python has no help topics or no library sources, as in some minimal images.
    """
    try:
        from pydoc_data.topics import topics  # one dictionary of strings
    except ImportError as error:
        raise InputError(
            "the embedded text needs the module pydoc_data, which this Python lacks: "
            "install a complete Python, or give `files` of your own"
        ) from error
    for name in sorted(topics):
        yield Document(topics[name].strip())
    root = Path(sysconfig.get_path("stdlib"))
    modules = _modules(root)
    if not modules:
        raise InputError(
            f"the embedded text is made from the standard library's sources and {root} has none: "
            "install a complete Python, or give `files` of your own"
        )
    for module in modules:
        text = _prose(root / module)
        if text:
            yield Document(text)


def _modules(root: Path) -> list[str]:
    found = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED]
        inside = Path(directory).relative_to(root)
        found += [(inside / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def _prose(path: Path) -> str:
    """Return a module's docstrings and whole-line comments in source order, or "" where it does not parse."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return ""
    pieces: list[tuple[int, str]] = []
    in_strings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            in_strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, _DEFINITIONS) and (docstring := ast.get_docstring(node)):
            pieces.append((node.body[0].lineno, docstring.strip()))
    pieces += _comments(source, in_strings)
    return "\n\n".join(text for _, text in sorted(pieces) if text)


def _comments(source: str, in_strings: set[int]) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of each block of comment lines.

    Lines are read in a tenth of the time that tokens take; ``in_strings`` are those inside of strings.
    """
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], start=1):  # the last line ends the last block
        stripped = line.strip()
        if stripped.startswith("#") and number not in in_strings:
            block.append(stripped.lstrip("#").strip())
        elif block:
            yield number - len(block), "\n".join(block).strip()
            block = []
