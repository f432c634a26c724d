"""Read and write YAML as people expect it: YAML 1.2's core schema, plain data only, and no key twice.

PyYAML follows YAML 1.1, in which ``no`` is false, ``12:30:45`` is a number in base 60 and ``1e-8`` is text. It keeps
the last of two equal keys without a word. Every YAML file that the project reads is read here.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from stacey_dist.errors import SettingsError
from stacey_dist.files import open_regular

_MAX_BYTES = 2**20
_MAX_DEPTH = 100
_MAX_VALUES = 50_000
_MAX_DIGITS = 300  # float64 ends at 309 digits

_TAG = "tag:yaml.org,2002:"
_PATTERNS = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}
"""What text without quotes stands for."""


class Loader(yaml.SafeLoader):
    """A loader of the core schema that raises a `yaml.YAMLError` for everything else, of bounded size and depth."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def get_single_node(self) -> Node | None:
        """Return the only document, once every alias in it is known to be harmless."""
        node: Node | None = super().get_single_node()
        if node is not None:
            _measure(node, {}, set())
        return node

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a value, unless it lies too deep: each level takes several of the interpreter's."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _error(f"values are nested more than {_MAX_DEPTH} deep", self.peek_event())
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Compose a mapping whose keys are text, each given once."""
        node: MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                shown = key.value or key.tag.removeprefix(_TAG) if isinstance(key, ScalarNode) else f"a {key.id}"
                raise _error(f"the key {_shorten(shown)} is not text; write it in quotes", key)
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _error(f"{key.value} is given twice, in line {lines[key.value]} and in line {line}", key)
            lines[key.value] = line
        return node

    def _number(self, node: ScalarNode) -> int | float:
        text, kind = self.construct_scalar(node), node.tag.removeprefix(_TAG)
        as_whole = re.fullmatch(_PATTERNS["int"], text) and (kind == "int" or text[:2] not in ("0o", "0x"))
        if not re.fullmatch(_PATTERNS[kind], text) and not as_whole:
            raise _error(f"{_shorten(text)} is not {'a whole number' if kind == 'int' else 'a number'}", node)
        if len(text) > _MAX_DIGITS:
            raise _error(f"a number of {len(text)} digits is not allowed", node)
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if text.lower().lstrip("+-") in (".inf", ".nan"):
            return float(text.replace(".", ""))
        if math.isinf(value := float(text)):
            raise _error(f"{text} is larger than any number; infinity is .inf", node)
        return value

    def _bool(self, node: ScalarNode) -> bool:
        text = self.construct_scalar(node).lower()
        if text not in ("true", "false"):
            raise _error(f"{_shorten(text)} is not true or false", node)
        return bool(text == "true")

    def _text(self, node: ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _error("half of a surrogate pair is not a character", node)
        return text

    def _refuse(self, node: Node) -> None:
        raise _error(f"the tag {_shorten(node.tag.replace(_TAG, '!!'))} is not allowed", node)


Loader.add_constructor(f"{_TAG}str", Loader._text)
for _kind in ("null", "seq", "map"):
    Loader.add_constructor(f"{_TAG}{_kind}", yaml.SafeLoader.yaml_constructors[f"{_TAG}{_kind}"])
Loader.add_constructor(f"{_TAG}int", Loader._number)
Loader.add_constructor(f"{_TAG}float", Loader._number)
Loader.add_constructor(f"{_TAG}bool", Loader._bool)
Loader.add_constructor(None, Loader._refuse)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern in _PATTERNS.items():
    for _each in (Loader, _Dumper):
        _each.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), None)


def load(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the text, one document.
        where: what messages begin with: the file, or the setting.

    Raises:
        SettingsError: the text is not valid YAML of the core schema, has a key twice, or holds an alias of itself,
            too many values, a number with too many digits or values nested too deep. The message is one line, with
            the line of the text.
    """
    try:
        return parse(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: {describe(error)}") from error


def parse(text: str) -> Any:
    """Return the value of a YAML text as `load` does, but raise `yaml.YAMLError`."""
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(f"is not allowed to be larger than {_MAX_BYTES >> 20} MiB")
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read(path: Path, name: str | None = None) -> Any:
    """Return the value of a YAML file.

    Args:
        path: the file, or a pipe that the shell made, as in ``--config <(command)``.
        name: what messages begin with (default: the path).

    Raises:
        SettingsError: as `load`, and for a file that cannot be read.
    """
    return load(read_text(path, name), name or str(path))


def read_text(path: Path, name: str | None = None) -> str:
    """Return the text of a file of settings; arguments and errors as for `read`."""
    name = name or str(path)
    try:
        of_shell = str(path).startswith(("/dev/", "/proc/")) and Path(path).is_fifo()
        with open(path, encoding="utf-8") if of_shell else io.TextIOWrapper(open_regular(path), "utf-8") as file:
            return file.read(_MAX_BYTES + 1)
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name}: cannot be read: it is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise SettingsError(f"{name}: cannot be read: {error}") from error


def dump(value: Any, comments: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return plain data as YAML, which `load` and readers of YAML 1.1 read alike.

    Args:
        value: the data.
        comments: what to write behind settings, by their full names, as in "optimizer.lr".
    """
    lines, section = [], ""
    for line in str(yaml.dump(value, Dumper=_Dumper, sort_keys=False)).splitlines():
        key, _, _ = line.partition(":")
        section = section if line.startswith((" ", "-")) else key
        comment = comments.get(f"{section}.{key.strip()}")
        lines.append(f"{line}  # {comment}\n" if comment else f"{line}\n")
    return "".join(lines)


def describe(error: yaml.YAMLError) -> str:
    """Return what is wrong in one line, with its place."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if isinstance(error, yaml.reader.ReaderError):
        return f"is not valid YAML: the character {error.character!r} at position {error.position} is not allowed"
    if problem is None or mark is None:
        return " ".join(str(error).split())
    context = getattr(error, "context", None)
    said = problem if isinstance(error, ConstructorError) else f"is not valid YAML: {context or ''} {problem}".strip()
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(said.split())}"


def _measure(node: Node, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
    """Return how many values a node stands for, and how deep it is, when every alias is written out."""
    if id(node) in above:
        raise _error("a value that contains itself is not allowed", node)
    if id(node) not in known:
        above.add(id(node))
        total, depth = 1, 0
        for child in _children(node):
            values, levels = _measure(child, known, above)
            total, depth = total + values, max(depth, levels)
        above.discard(id(node))
        known[id(node)] = total, depth + 1
        if total > _MAX_VALUES:
            raise _error(f"more than {_MAX_VALUES:,} values, with aliases written out, are not allowed", node)
        if depth >= _MAX_DEPTH:
            raise _error(f"values are nested more than {_MAX_DEPTH} deep, with aliases written out", node)
    return known[id(node)]


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, SequenceNode):
        yield from node.value


def _error(problem: str, place: Any) -> ConstructorError:
    return ConstructorError(None, None, problem, place.start_mark)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
