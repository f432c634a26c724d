"""The embedded text: there, the same every time, made without importing what it reads."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from stacey_dist.data import Document, embedded_source, standard_library_documents
from stacey_dist.data.embedded import _modules, _prose
from stacey_dist.errors import InputError

ROOT = Path(__file__).parents[2]


def test_is_about_three_megabytes_of_documents(library: list[Document]) -> None:
    documents = library
    assert 2_000_000 < sum(len(document.text) for document in documents) < 6_000_000
    assert len({document.text for document in documents}) > 300
    assert all(document.text == document.text.strip() != "" for document in documents)
    modules = _modules(Path(sysconfig.get_path("stdlib")))
    assert len(documents) > 50 + len(modules) / 2  # topics, and the modules with prose
    assert modules == sorted(modules)
    assert "asyncio/tasks.py" in modules
    assert not any("/test" in module or "site-packages" in module for module in modules)
    argparse = next(document.text for document in documents if "Command-line parsing library" in document.text)
    assert "Command-line parsing library" in argparse
    assert "Author: Steven J. Bethard" in argparse  # a comment
    assert "def parse_args" not in argparse


def test_docstrings_and_comments_in_source_order(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '"""Module."""\n# One,\n#   two.\nx = """\n# in a string\n"""\nclass C:\n    """Class."""\n'
        "    async def f(self):  # beside code\n        '''Method.\n\n        More.\n        '''\n"
        "        # Inside.\n"
        "y = [\n    # In a list.\n    1,\n]\n#last"
    )
    assert _prose(tmp_path / "m.py") == (
        "Module.\n\nOne,\ntwo.\n\nClass.\n\nMethod.\n\nMore.\n\nInside.\n\nIn a list.\n\nlast"
    )
    (tmp_path / "m.py").write_text("x = (")
    assert _prose(tmp_path / "m.py") == ""


def test_source() -> None:
    source = embedded_source()
    assert next(source.documents()).text
    assert source.validation_inputs is None


def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path} has none"):
        list(standard_library_documents())
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="pydoc_data"):
        list(standard_library_documents())


def test_importing_the_package_is_cheap_and_reading_imports_nothing() -> None:
    code = (
        "import itertools, sys, types\n"
        "sys.modules['stacey_dist'] = types.ModuleType('stacey_dist')\n"
        "sys.modules['stacey_dist'].__path__ = ['stacey_dist']\n"
        "import stacey_dist.data as data\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'sentencepiece', 'datasets', 'pyarrow', 'google'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "before = set(sys.modules)\n"
        "for _ in itertools.islice(data.standard_library_documents(), 150): pass\n"
        # What `sysconfig` itself loads to know its paths does not count.
        "known = ('pydoc_data', '_sysconfigdata')\n"
        "print(sorted(m for m in set(sys.modules) - before if not m.startswith(known)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n[]\n"
