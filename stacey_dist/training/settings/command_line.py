"""A configuration from YAML files and command-line options.

jsonargparse checks the types and writes `--help`; YAML is read by `stacey_dist.yaml_files`. This adds the nearest right
name for a mistyped one.
"""

import dataclasses
import difflib
import functools
import os
import re
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError

Config = TypeVar("Config")


def parse(
    config_class: type[Config],
    arguments: Sequence[str] | None = None,
    program: str | None = None,
    elsewhere: Mapping[str, type] = MappingProxyType({}),
) -> Config:
    """Return the configuration of `arguments`: defaults, then --config files, then options.

    Args:
        config_class: a dataclass whose fields are settings, or sections of them, which are dataclasses too. Its
            `instead_of` may say which setting becomes null where another is given later.
        arguments: the options; by default those of the command line.
        program: the name in messages; by default the program's own.
        elsewhere: other programs and their configurations, which a message names for a setting that is theirs.

    Prints the help and exits for --help; prints the error and exits with status 2 for a bad option, an unknown
    name (with the nearest right one) or a value of the wrong type.
    """
    parser = _parser(config_class, program)  # type: ignore[arg-type]
    try:
        options = list(_options(sys.argv[1:] if arguments is None else arguments, parser.kinds))
        if any(name in ("help", "h") for name, _ in options):
            parser.parse_args(["--help"])
        settings = parser.get_defaults()
        own = values = parser.values(config_class, {}, settings)
        given: dict[str, int] = {}  # by which file or, after all files, by which option
        for number, path in enumerate([value for name, value in options if name == "config"]):
            parser.source = f"--config {path}: "
            of_file = _read(path, parser.kinds, elsewhere)
            settings = parser.parse_object(of_file, namespace=settings, defaults=False)
            before, values = values, parser.values(config_class, {}, settings)
            _drop_previous_defaults(given, before, values)
            given.update(dict.fromkeys(of_file, number))
        parser.source = ""
        typed = {name: _option(name, value, parser.kinds) for name, value in options if name != "config"}
        before, values = values, parser.values(config_class, typed, settings)
        _drop_previous_defaults(given, before, values)
        given.update({name: len(options) + number for number, (name, _) in enumerate(options) if name != "config"})
        config = config_class(**{name: _choose(value, own[name], name, given) for name, value in values.items()})
        for name, other in getattr(config_class, "instead_of", {}).items():
            if given.get(name, -1) > given.get(other, -1):
                section, _, setting = other.rpartition(".")
                setattr(getattr(config, section), setting, None)
        return config
    except SettingsError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes of a node, which all find it
            line = str(error).strip().encode("utf-8", "backslashreplace").decode()
            print(f"{parser.prog}: error: {line}", file=sys.stderr)
            # The commands of stacey-dist list their own options alone.
            name = "train_llm.py" if parser.prog.startswith("stacey-dist ") else parser.prog
            print(f"Try '{name} --help' for every setting.", file=sys.stderr)
        sys.exit(2)


def _drop_previous_defaults(given: dict[str, int], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Treat settings as not given if they equal the previous optimizer's defaults, and another optimizer is chosen."""
    for name, section in before.items():
        if hasattr(section, "chosen") and section.method != after[name].method:
            own = dataclasses.replace(section, **dict.fromkeys(section.chosen))
            for each in section.chosen:
                if getattr(section, each) == getattr(own, each):
                    given.pop(f"{name}.{each}", None)


def _choose(section: Any, default: Any, name: str, given: Mapping[str, int]) -> Any:
    """Return a section with the numbers of the method that was chosen in it, where none were given."""
    if not hasattr(section, "chosen"):
        return section
    same = section.method == default.method
    missing = [each for each in section.chosen if f"{name}.{each}" not in given]
    return dataclasses.replace(section, **{each: getattr(default, each) if same else None for each in missing})


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists and numbers, as YAML and JSON can hold."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def flatten(nested: Mapping[str, Any], prefix: str = "", *, items: bool = False) -> dict[str, Any]:
    """Return {"a.b": 1} for {"a": {"b": 1}}; with `items`, {"a[0].b": 1} for {"a": [{"b": 1}]}, too.

    An empty mapping is kept as a value.
    """
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}.", items=items))
        elif items and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            flat.update(flatten({f"{name}[{i}]": item for i, item in enumerate(value)}, prefix, items=True))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def help_of(config_class: type, program: str, about: str, sections: Sequence[str]) -> str:
    """Return the help of a program that reads some sections of a configuration alone.

    Args:
        config_class: as for `parse`.
        program: the program's name.
        about: what it does.
        sections: what the names of its settings begin with.
    """
    parser = _parser.__wrapped__(config_class, program)  # one of its own, not the one that parses
    parser.usage, parser.description = f"{program} [--section.name value ...]", about
    for group in parser._action_groups:
        group._group_actions = [a for a in group._group_actions if a.dest.partition(".")[0] in sections]
    return str(parser.format_help())


@functools.cache
def _parser(config_class: type, program: str | None) -> "_Parser":
    """Return the parser of a configuration's settings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", yaml_files.parse, exceptions=(yaml.YAMLError,))
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--section.name value ...]",
        description=f"{(config_class.__doc__ or '').strip()} Every setting can be given in a YAML file (--config) and "
        "as an option (--section.name value); options win over files, and later ones over earlier ones.",
    )
    parser.add_argument("--config", help="A YAML file of settings; may be given several times.")
    parser.add_class_arguments(config_class, as_group=False)
    parser.kinds = dict(_fields(config_class))
    sections = [kind for kind in get_type_hints(config_class).values() if dataclasses.is_dataclass(kind)]
    docstrings = [kind.__doc__ or "" for kind in sections]
    titles = {text.split("\n")[0].rstrip("."): " ".join(text.split()) for text in docstrings}
    for group in parser._action_groups:
        group.title = titles.get((group.title or "").rstrip(":."), group.title)
    for action in parser._actions:
        # jsonargparse's own: a file for a section, and the help of a list of sections.
        if action.dest.endswith(".help") or any(name.startswith(f"{action.dest}.") for name in parser.kinds):
            action.help = SUPPRESS
    return parser


class _Parser(ArgumentParser):
    kinds: dict[str, Any]
    source: str = ""
    """Where the settings come from that are being parsed: what messages begin with."""

    def values(self, config_class: type, given: Any, settings: Any) -> dict[str, Any]:
        """Return the values of a configuration's fields: what is given, over other settings."""
        # `settings` has every default already, as in `parse`; parsing them again would take a third of the time.
        parsed = self.instantiate(self.parse_object(given, namespace=settings, defaults=False) if given else settings)
        return {field.name: parsed[field.name] for field in dataclasses.fields(config_class)}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a SettingsError, for a value of a wrong type in one line."""
        key = re.search(r'Parser key "([\w.]+)":', message)
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        if key and value and key[1] in self.kinds:
            shown = value[1] if len(value[1]) <= 200 else f"{value[1][:197]}..."
            allowed = _describe(self.kinds[key[1]])
            message = f"{self.source}{key[1]}: {shown} is not allowed; it must be {allowed}"
        raise SettingsError(message)


def _describe(kind: Any) -> str:
    """Return a type in a user's words."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if get_origin(kind) is list:
        return f"a list, each {_describe(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"{len(arguments)} values, each {_describe(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        return "settings: " + ", ".join(field.name for field in dataclasses.fields(kind))
    if get_origin(kind) in (Union, UnionType):
        words = " or ".join(map(_describe, _alternatives(kind)))
        return words + (", or null" if NoneType in arguments else "")
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind))


def _fields(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's full name and type, without the values that are allowed."""
    kinds = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{field.name}.")
        elif not _is_supported(kind):
            raise TypeError(
                f"{config_class.__name__}.{field.name}: a setting of type {kind} is not supported; use bool, int, "
                "float, str, Literal, None, lists and tuples of fixed length of these, or a dataclass"
            )
        else:
            yield f"{prefix}{field.name}", kind


def _is_supported(kind: Any) -> bool:
    """Return whether YAML files and the command line can give a value of this type."""
    if kind in (bool, int, float, str, NoneType) or get_origin(kind) is Literal or dataclasses.is_dataclass(kind):
        return True
    parts = get_args(kind)
    return get_origin(kind) in (list, tuple, Union, UnionType) and bool(parts) and all(map(_is_supported, parts))


def _options(arguments: Sequence[str], kinds: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every option's name and value; for a list, all the words that follow, as an unquoted pattern gives them."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument in ("-h", "--help"):
            yield name.removeprefix("-"), ""
            continue
        if not argument.startswith("--"):
            raise SettingsError(f"{argument}: an option, as in --section.name value, must come before it")
        words = [value] if equals else []
        while rest and not rest[0].startswith("--") and not (equals or rest[0] == "-h"):
            words.append(rest.pop(0))
        if not words:
            raise SettingsError(f"--{name}: a value is missing")
        if len(words) > 1 and name in ("config", *kinds) and not _takes_several_words(kinds.get(name)):
            raise SettingsError(
                f"--{name}: it takes one value, and got {shlex.join(words[:3])}{' …' if words[3:] else ''}; put quotes "
                "around a pattern or a text with spaces"
            )
        yield name, words if len(words) > 1 else words[0]


def _option(name: str, value: str | list[str], kinds: Mapping[str, Any]) -> Any:
    """Return an option's value, as a person types it, for a setting of its type."""
    if name not in kinds:
        raise SettingsError(f"unknown option --{name}{_nearest(name, ['config', *kinds], '--')}")
    kind = kinds[name]
    if isinstance(value, list):
        sequence = _sequence(kind)
        return value if get_origin(sequence) is list else _from_text(f"--{name}", ",".join(value), kind)
    return _from_text(f"--{name}", value, kind)


def _from_text(where: str, value: str, kind: Any) -> Any:
    """Return the value that a text stands for, as a person types it, for a setting of this type."""
    if value == "null" and get_origin(kind) in (list, tuple):
        return _value(where, None, kind)
    sequence = kind if value == "null" else _sequence(kind)
    if get_origin(sequence) in (list, tuple):
        is_yaml = value.startswith("[") and value.endswith("]")  # and no pattern, as in [0-9].txt
        if get_origin(sequence) is list and not _of_sections(sequence) and value and not is_yaml:
            return value.split(",")
        value = value if value.startswith("[") else f"[{value}]"
    elif _is_text(kind):
        return None if value == "null" and NoneType in get_args(kind) else value
    loaded = yaml_files.load(".inf" if value == "inf" else value, where)
    if _of_sections(sequence):
        return _value(where.removeprefix("--"), loaded, sequence)
    return _value(where, loaded, kind)


def _read(path: str, kinds: Mapping[str, Any], elsewhere: Mapping[str, type]) -> dict[str, Any]:
    """Return a file's settings by their full names.

    Raises SettingsError for what jsonargparse does not find, or tells of in its own words.
    """
    settings = yaml_files.read(Path(path), f"--config {path}")
    if not isinstance(settings, dict):
        raise SettingsError(f"--config {path}: it must hold settings, as in 'train: {{max_steps: 100}}'")
    sections = {name.split(".")[0] for name in kinds if "." in name}
    for section in sections & settings.keys():
        if settings[section] is None:  # all of its lines are comments
            settings[section] = {}
        if not isinstance(settings[section], dict):
            raise SettingsError(f"--config {path}: {section} must hold settings, not {settings[section]!r}")
    checked: dict[str, Any] = {}
    for name, value in flatten(settings).items():
        if name in sections:  # it is empty
            continue
        if name not in kinds:
            others = [program for program, other in elsewhere.items() if name in dict(_fields(other))]
            hint = f"; it is one of {others[0]}" if others else _nearest(name, list(kinds))
            raise SettingsError(f"--config {path}: unknown setting {name}{hint}")
        if name in checked:
            raise SettingsError(f"--config {path}: {name} is given twice, once with a dot in its name")
        where = f"--config {path}: {name}"
        kind = kinds[name]
        stands_for_another = isinstance(value, str) and (get_origin(kind) in (list, tuple) or not _is_text(kind))
        checked[name] = (_from_text if stands_for_another else _value)(where, value, kind)
    return checked


def _takes_several_words(kind: Any) -> bool:
    """Return whether each of several words on the command line is an item of the value. A list of sections is YAML."""
    return any(get_origin(one) in (list, tuple) and not _of_sections(one) for one in (kind, *get_args(kind)))


def _is_text(kind: Any) -> bool:
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(arguments[0], str)
    return kind is str or any(map(_is_text, arguments))


def _value(where: str, value: Any, kind: Any) -> Any:
    """Return a file's value for a setting of this type."""
    kinds = (kind, *get_args(kind))
    if _of_sections(kind):
        if not isinstance(value, list):
            raise SettingsError(f"{where}: {value} is not allowed; it must be {_describe(kind)}")
        return [_item(f"{where}[{i}]", item, kinds[1]) for i, item in enumerate(value)]
    alternatives = _alternatives(kind)
    if isinstance(value, bool) and not any(one is bool or value in _truths(one) for one in alternatives):
        raise SettingsError(f"{where}: {str(value).lower()} is not allowed; it must be {_describe(kind)}")
    if value is None and type(None) not in kinds:
        raise SettingsError(f"{where}: null is not allowed; it must be {_describe(kind)}")
    if isinstance(value, list) and len(alternatives) == 1 and get_origin(alternatives[0]) in (list, tuple):
        inner = get_args(alternatives[0])
        inner = inner * len(value) if get_origin(alternatives[0]) is list else inner
        return [*(_value(where, *pair) for pair in zip(value, inner, strict=False)), *value[len(inner) :]]
    if isinstance(value, str):
        words = {"yes": True, "on": True, "no": False, "off": False}  # of YAML 1.1
        if bool in alternatives and value.lower() in words:
            return words[value.lower()]
        if all(one in (bool, int, float) for one in alternatives):
            return _number(where, value, kind)
    return value


def _number(where: str, text: str, kind: Any) -> int | float:
    """Return the number that a text stands for if its digits are grouped by underscores, as in 1_000.

    jsonargparse would read any other text by YAML 1.1, in which 12:30 is 750.
    """
    number: Any = None
    if "_" in text and _alternatives(kind) != [bool]:
        number = yaml_files.load(re.sub("(?<=[0-9])_(?=[0-9])", "", text), where)
    if type(number) not in (int, float):
        raise SettingsError(f"{where}: {text} is not allowed; it must be {_describe(kind)}")
    return number


def _truths(kind: Any) -> list[Any]:
    """Return the truth values that a Literal allows."""
    return [one for one in get_args(kind) if isinstance(one, bool)] if get_origin(kind) is Literal else []


def _alternatives(kind: Any) -> list[Any]:
    """Return the types of a union, or the only one, without None."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [one for one in kinds if one is not NoneType]


def _sequence(kind: Any) -> Any:
    """Return the list or tuple among the alternatives of a type; the type itself if there is none."""
    return next((one for one in get_args(kind) if get_origin(one) in (list, tuple)), kind)


def _of_sections(kind: Any) -> bool:
    """Return whether a type is a list of sections."""
    return get_origin(kind) is list and dataclasses.is_dataclass(get_args(kind)[0])


def _item(where: str, value: Any, kind: Any) -> Any:
    """Return an item of a list of sections."""
    parser = _parser(kind, None)
    if not isinstance(value, dict):
        raise SettingsError(f"{where}: {value} is not allowed; it must be {_describe(kind)}")
    for name in value:
        if name not in parser.kinds:
            raise SettingsError(f"{where}: unknown setting {name}{_nearest(str(name), list(parser.kinds))}")
    parser.source = f"{where}."
    given = {name: _value(f"{where}.{name}", inner, parser.kinds[name]) for name, inner in value.items()}
    return kind(**parser.values(kind, given, parser.get_defaults()))


# What other programs call a setting.
_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "schedule.name",
    "num_train_epochs": "train.epochs",
    "steps": "train.max_steps",
    "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "grad_clip": "train.max_grad_norm",
    "output_dir": "run_dir",
    "resume": "checkpoint.resume_from",
}


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    # A right name in the wrong section, or without one, is nearer than one that is spelled alike.
    same_end = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    elsewhere = _ELSEWHERE.get(name.split(".")[-1].replace("-", "_"))
    best = (same_end or ([elsewhere] if elsewhere in known else close))[:1]
    return f"; did you mean {prefix}{best[0]}?" if best else ""
