"""YAML: one meaning for every text, and one line for what has none."""

import math
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError

CORE = """
time: 12:30:45
date: 2001-12-14
words: [no, yes, on, off, y, n]
truth: [true, False]
nothing: [null, ~, ]
whole: [7, -7, 010, 0x1f, 0o17]
numbers: [1e-8, 1E5, .5, 1., -.inf, +.inf]
text: [1_000, 0b1, =, 1e, '1e-8', "7"]
"""


def test_plain_values_are_those_of_the_core_schema():
    assert yaml_files.load(CORE, "here") == {
        "time": "12:30:45",
        "date": "2001-12-14",
        "words": ["no", "yes", "on", "off", "y", "n"],
        "truth": [True, False],
        "nothing": [None, None],
        "whole": [7, -7, 10, 31, 15],
        "numbers": [1e-8, 1e5, 0.5, 1.0, -math.inf, math.inf],
        "text": ["1_000", "0b1", "=", "1e", "1e-8", "7"],
    }
    assert math.isnan(yaml_files.load(".nan", "here"))


def test_aliases_and_merges_are_written_out():
    text = "base: &base {a: 1, b: 2}\none: {<<: *base, b: 3}\ntwo: {<<: *base}\nlist: [*base, *base]\n"
    loaded = yaml_files.load(text, "here")
    assert loaded["one"] == {"a": 1, "b": 3}
    assert loaded["two"] == {"a": 1, "b": 2}
    assert loaded["list"] == [loaded["base"]] * 2


def bomb():
    lines = ["l0: &l0 [a, a, a, a, a, a, a, a]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 8)}]" for n in range(1, 30)]
    return "\n".join(lines)


# (text, the line of the text that is named, what is said)
REFUSED = [
    ("a: 1\nb: 2\na: 3", 3, "a is given twice, in line 1 and in line 3"),
    ("deep:\n  er:\n    - {x: 1,\n       x: 2}", 4, "x is given twice, in line 3 and in line 4"),
    ("'a': 1\n\"a\": 2", 2, "a is given twice, in line 1 and in line 2"),
    ("b: &b {x: 1}\n<<: *b\n<<: *b", 3, "<< is given twice, in line 2 and in line 3"),
    ("- 1\n- &x [*x]", 2, "contains itself"),
    ("a: &x\n  b: {c: *x}", 1, "contains itself"),
    (bomb(), 6, "more than 50,000 values"),
    ("a: 1\nb: " + "9" * 5000, 2, "a number of 5000 digits is not allowed"),
    ("a: 0x" + "f" * 5000, 1, "a number of 5002 digits is not allowed"),
    ("a: 1e999", 1, "larger than any number; infinity is .inf"),
    ("a: " + "[" * 3000 + "]" * 3000, 1, "nested more than 100 deep"),
    ("- " * 3000, 1, "nested more than 100 deep"),
    (
        "a: &a [1]\n" + "\n".join(f"a{i}: &a{i} [[[*a{i - 1}]]]" for i in range(1, 40)).replace("*a0", "*a"),
        34,
        "100 deep",
    ),
    ("a: 1\n\tb: 2", 2, "'\\t'"),
    ("a: 1\n---\nb: 2", 2, "expected a single document"),
    ("1: 2", 1, "the key 1 is not text"),
    ("a: {true: 2}", 1, "the key true is not text"),
    ("null: 2", 1, "the key null is not text"),
    ("? [a, b]\n: 2", 1, "the key a sequence is not text"),
    ("a: !!python/object/apply:os.getcwd []", 1, "the tag !!python/object/apply:os.getcwd is not allowed"),
    ("a: !!python/name:os.getcwd ''", 1, "is not allowed"),
    ("a: !!binary aGk=", 1, "the tag !!binary is not allowed"),
    ("a: !!set {x}", 1, "the tag !!set is not allowed"),
    ("a: !own x", 1, "the tag !own is not allowed"),
    ("a: !!int seven", 1, "seven is not a whole number"),
    ("a: !!float 0x10", 1, "0x10 is not a number"),
    ("a: !!bool maybe", 1, "maybe is not true or false"),
    ("<<: 3", 1, "expected a mapping"),
    ("a: *nothing", 1, "undefined alias 'nothing'"),
    ("a: [1\nb: 2", 2, "is not valid YAML"),
    ('a: "\\ud800"', 1, "surrogate"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_has_no_single_meaning_is_refused_in_one_line(text, line, message):
    with pytest.raises(SettingsError) as error:
        yaml_files.load(text, "file.yaml")
    assert str(error.value).startswith(f"file.yaml: line {line}, column ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_a_control_character_is_refused_in_one_line():
    with pytest.raises(SettingsError, match=r"^file.yaml: is not valid YAML: the character 0 at position 4 is not"):
        yaml_files.load("a: b\0", "file.yaml")


def test_files_that_are_none(tmp_path):
    (tmp_path / "latin1").write_bytes(b"a: \xe9t\xe9")
    (tmp_path / "large").write_text("a" * 2**21)
    os.mkfifo(tmp_path / "fifo")
    for name, message in [
        ("nothing", "cannot be read: .*No such file"),
        ("latin1", "not UTF-8 text .byte 3"),
        ("large", "larger than 1 MiB"),
        ("fifo", "where a regular file belongs"),
        (".", "where a regular file belongs"),
        ("a\0b", "null"),
    ]:
        with pytest.raises(SettingsError, match=message):
            yaml_files.read(tmp_path / name)
    with pytest.raises(SettingsError, match="where a regular file belongs"):
        yaml_files.read("/dev/zero")


def test_a_pipe_of_the_shell_is_a_file():
    reader, writer = os.pipe()
    with open(reader), open(writer, "w") as file:
        file.write("a: 1")
        file.close()
        assert yaml_files.read(f"/dev/fd/{reader}") == {"a": 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LOOKS_LIKE_ELSE = ["no", "1e5", "1e-8", "12:30:45", "", "~", "<<", "0o7", "2001-01-01", ".inf", "1_0", "0x1", "null"]


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=8) | st.sampled_from(LOOKS_LIKE_ELSE), VALUES | st.sampled_from(LOOKS_LIKE_ELSE))
)
def test_what_is_written_reads_back_the_same_here_and_elsewhere(value):
    text = yaml_files.dump(value)
    assert yaml_files.load(text, "here") == value
    assert yaml.safe_load(text) == value
