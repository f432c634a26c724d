"""Mutated corpora give the right documents, or one of our errors that names the file."""

import gzip
import io
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacey_dist.data import files_source
from stacey_dist.errors import InputError
from tests.data.helpers import records

CASES = [
    pytest.param(range(300), id="300"),
    pytest.param(range(300, 20_000), id="thousands", marks=[pytest.mark.exhaustive, pytest.mark.timeout(3000)]),
]
INSERTED = [
    b"\0",
    b"\xff",
    b"\n",
    b"\r",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[" * 3000,
    b"9" * 5000,
    b"\\ud800",
    b"\xef\xbb\xbf",
]
INSERTED += [b'{"text": 1}\n', b"null", b" ", b"\xe2\x80\xa8", b"\x1f\x8b\x08", b"PAR1", b"1e999", b"NaN", b"\\u0000"]


def texts(generator: random.Random) -> list[str]:
    alphabet = 'ab é😀\n\t"\\\u2028\u00a0'
    return ["".join(generator.choices(alphabet, k=generator.randint(0, 40))) for _ in range(generator.randint(1, 30))]


def mutated(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.choice((0, 1, 1, 2, 5))):
        at, length = generator.randrange(len(changed) + 1), generator.randint(1, 20)
        kind = generator.randrange(5)
        if kind == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[at:at] = generator.choice(INSERTED)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            del changed[at:]
        else:
            changed[at : at + length] = generator.randbytes(length)
    return bytes(changed)


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": i}).encode() + b"\n" for i, text in enumerate(texts))


def documents_of_json_lines(content: bytes) -> tuple[list[str], int]:
    """Return the documents and the number of bad lines, by other means than the reader's."""
    good, bad = [], 0
    for number, line in enumerate(io.BytesIO(content)):
        try:
            if b"\0" in line:
                raise ValueError
            decoded = line.decode()
            if number == 0:
                decoded = decoded.removeprefix("\ufeff")
            if not decoded.strip():
                continue
            text = json.loads(decoded)["text"]
            text.encode()
            if text.strip():
                good.append(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError):
            bad += 1
    return good, bad


def read(file: Path) -> tuple[list[str], list[str]]:
    texts, messages = records(file)
    for message in messages:
        assert message.startswith(str(file))
        assert "\n" not in message
        assert len(message) < 1000
    return texts, messages


def check_the_error(file: Path, has_bad: bool) -> None:
    """Assert that by default the first bad record ends the preparation with one line."""
    message = None
    try:
        list(files_source([str(file)], [], "text").documents())
    except InputError as error:
        message = str(error)
    assert message is not None or not has_bad
    assert message is None or (str(file) in message and len(message.splitlines()) == 1)


def fuzz(seeds: range, file: Path, work: Callable[[random.Random], None]) -> None:
    for seed in seeds:
        try:
            work(random.Random(seed))
        except Exception as error:
            if not (isinstance(error, InputError) and str(file) in str(error)):
                raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("seeds", CASES)
def test_json_lines(tmp_path: Path, seeds: range) -> None:
    file = tmp_path / "a.jsonl"

    def work(generator: random.Random) -> None:
        content = mutated(json_lines(texts(generator)), generator) or b"\n"
        file.write_bytes(content)
        expected, bad = documents_of_json_lines(content)
        check_the_error(file, bad > 0)
        found, messages = read(file)
        assert (found, len(messages)) == (expected, bad)

    fuzz(seeds, file, work)


@pytest.mark.parametrize("seeds", CASES)
def test_compressed_json_lines(tmp_path: Path, seeds: range) -> None:
    file = tmp_path / "a.json.gz"

    def work(generator: random.Random) -> None:
        whole = texts(generator)
        content = mutated(gzip.compress(json_lines(whole), generator.choice((0, 1, 9))), generator) or b"\0"
        file.write_bytes(content)
        try:
            expected, bad = documents_of_json_lines(gzip.decompress(content))
        except (OSError, EOFError, zlib.error):
            expected, bad = None, 1
        check_the_error(file, bad > 0)
        found, messages = read(file)
        if expected is None:
            assert any("gzip" in message for message in messages)
        else:
            assert (found, len(messages)) == (expected, bad)

    fuzz(seeds, file, work)


@pytest.mark.parametrize("seeds", CASES)
def test_parquet(tmp_path: Path, seeds: range) -> None:
    """Pages have checksums here: what is read is right, or said to be damaged."""
    file = tmp_path / "a.parquet"

    def work(generator: random.Random) -> None:
        whole = texts(generator)
        written = io.BytesIO()
        compression = generator.choice(("none", "snappy", "zstd", "gzip"))
        pq.write_table(
            pa.table({"text": whole, "n": range(len(whole))}),
            written,
            row_group_size=generator.randint(1, 20),
            compression=compression,
            write_page_checksum=True,
        )
        content = mutated(written.getvalue(), generator) or b"\0"
        file.write_bytes(content)
        check_the_error(file, False)
        found, messages = read(file)
        if content == written.getvalue():
            assert (found, messages) == ([text for text in whole if text.strip()], [])

    fuzz(seeds, file, work)


@pytest.mark.parametrize("seeds", CASES)
def test_plain_text(tmp_path: Path, seeds: range) -> None:
    file = tmp_path / "a.txt"

    def work(generator: random.Random) -> None:
        content = mutated("\n\n".join(texts(generator)).encode(), generator) or b"\n"
        file.write_bytes(content)
        lines = content.split(b"\n")
        found, messages = read(file)
        assert len(messages) <= len(lines)
        if not messages:
            expected = content.decode("utf-8-sig").replace("\r\n", "\n")
            assert "".join("\n".join(found).split()) == "".join(expected.split())
        check_the_error(file, bool(messages))

    fuzz(seeds, file, work)
