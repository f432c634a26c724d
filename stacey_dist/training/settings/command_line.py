"""A configuration from YAML files and command-line options.

YAML is read by `stacey_dist.yaml_files`, types are checked by `value_types`, and jsonargparse writes `--help`.
"""

import dataclasses
import difflib
import os
import re
import shlex
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError
from stacey_dist.training.settings.value_types import check, describe, is_of_type, item_kinds, shown

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
    program = program or Path(sys.argv[0]).name
    try:
        kinds = dict(_fields(config_class))
        options = list(_options(sys.argv[1:] if arguments is None else arguments, kinds))
        if any(name in ("help", "h") for name, _ in options):
            _parser(config_class, program).print_help()
            sys.exit(0)
        own = values = _defaults(config_class)
        given: dict[str, int] = {}  # by which file or, after all files, by which option
        for number, path in enumerate([value for name, value in options if name == "config"]):
            of_file = _read(path, kinds, elsewhere)
            before, values = values, _changed(values, of_file)
            _drop_previous_defaults(given, before, values)
            given.update(dict.fromkeys(of_file, number))
        typed = {name: _option(name, value, kinds) for name, value in options if name != "config"}
        before, values = values, _changed(values, typed)
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
            print(f"{program}: error: {line}", file=sys.stderr)
            # The commands of stacey-dist list their own options alone.
            name = "train_llm.py" if program.startswith("stacey-dist ") else program
            print(f"Try '{name} --help' for every setting.", file=sys.stderr)
        sys.exit(2)


def _defaults(config_class: Any) -> dict[str, Any]:
    """Return the values that a configuration's fields have where nothing is given; None for one that must be given."""
    defaults = {}
    for field in dataclasses.fields(config_class):
        missing = None if field.default is dataclasses.MISSING else field.default
        defaults[field.name] = missing if field.default_factory is dataclasses.MISSING else field.default_factory()
    return defaults


def _changed(values: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of fields, some of which are sections, after some settings were given."""
    changed = {}
    for name, value in values.items():
        full_name = f"{prefix}{name}"
        if dataclasses.is_dataclass(value) and full_name not in given:
            inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            value = dataclasses.replace(value, **_changed(inner, given, f"{full_name}."))  # type: ignore[type-var]
        changed[name] = given.get(full_name, value)
    return changed


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
    parser = _parser(config_class, program)
    parser.usage, parser.description = f"{program} [--section.name value ...]", about
    for group in parser._action_groups:
        group._group_actions = [a for a in group._group_actions if a.dest.partition(".")[0] in sections]
    return str(parser.format_help())


def _parser(config_class: type, program: str) -> ArgumentParser:
    """Return the parser that writes the help of a configuration's settings."""
    import jsonargparse  # which takes a while, and is needed for the help alone

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--section.name value ...]",
        description=f"{(config_class.__doc__ or '').strip()} Every setting can be given in a YAML file (--config) and "
        "as an option (--section.name value); options win over files, and later ones over earlier ones.",
    )
    parser.add_argument("--config", help="A YAML file of settings; may be given several times.")
    parser.add_class_arguments(config_class, as_group=False)
    sections = [kind for kind in get_type_hints(config_class).values() if dataclasses.is_dataclass(kind)]
    docstrings = [kind.__doc__ or "" for kind in sections]
    titles = {text.split("\n")[0].rstrip("."): " ".join(text.split()).rstrip(".") for text in docstrings}
    for group in parser._action_groups:
        group.title = titles.get((group.title or "").rstrip(":."), group.title)
    names = [name for name, _ in _fields(config_class)]
    for action in parser._actions:
        # jsonargparse's own: a file for a section, and the help of a list of sections.
        if action.dest.endswith(".help") or any(name.startswith(f"{action.dest}.") for name in names):
            action.help = SUPPRESS
    return parser


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
    """Return the value of an option, which is given by one or several words."""
    if name not in kinds:
        raise SettingsError(f"unknown option --{name}{_nearest(name, ['config', *kinds], '--')}")
    kind = kinds[name]
    is_null = value == "null" and (NoneType in get_args(kind) or get_origin(kind) in (list, tuple))
    return _convert(name, None if is_null else value, kind)


def _convert(where: str, value: Any, kind: Any) -> Any:
    """Return a value that a person wrote, as its setting has it.

    Raises SettingsError, which begins with `where`, for a value of another type.
    """
    if isinstance(value, str):
        value = _from_text(where, value, kind)
    converted = _adapt(where, value, kind)
    check(is_of_type(kind, converted), where, shown(value), f"it must be {describe(kind)}")
    return converted


def _from_text(where: str, text: str, kind: Any) -> Any:
    """Return what a text stands for where a value of this type belongs. A list may be written without brackets."""
    sequence = next((one for one in (kind, *get_args(kind)) if get_origin(one) in (list, tuple)), None)
    if sequence:
        is_yaml = text.startswith("[") and text.endswith("]")  # and no pattern, as in [0-9].txt
        if get_origin(sequence) is list and not _of_sections(sequence) and text and not is_yaml:
            return text.split(",")
        text = text if text.startswith("[") else f"[{text}]"
    elif _is_text(kind):
        return text
    return yaml_files.load(text, where)


def _adapt(where: str, value: Any, kind: Any) -> Any:
    """Return a value as its type has it, where YAML or people write it otherwise; a value of another type as it is."""
    if get_origin(kind) in (Union, UnionType):
        adapted = ((one, _adapt(where, value, one)) for one in get_args(kind))
        return next((other for one, other in adapted if is_of_type(one, other)), value)
    if _of_sections(kind) and isinstance(value, list):
        return [_convert(f"{where}[{i}]", item, get_args(kind)[0]) for i, item in enumerate(value)]
    if get_origin(kind) in (list, tuple) and isinstance(value, list):
        kinds = item_kinds(kind, value)
        if len(kinds) != len(value):
            return value
        items = [_adapt(where, item, one) for item, one in zip(value, kinds, strict=True)]
        return tuple(items) if get_origin(kind) is tuple else items
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _section(where, value, kind)
    if kind in (bool, int, float) and isinstance(value, str):  # in quotes, an item of a list, inf or 1_000
        number = ".inf" if value == "inf" else re.sub(r"(?<=\d)_(?=\d)", "", value)
        with suppress(SettingsError):
            value = yaml_files.load(number, where)
    if kind is bool and isinstance(value, str):  # YAML 1.1's words, where no text is meant
        return {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    return float(value) if kind is float and type(value) is int else value


def _section(where: str, value: Mapping[str, Any], kind: Any) -> Any:
    """Return a section that is a value: an item of a list."""
    kinds = get_type_hints(kind)
    for name in value:
        if name not in kinds:
            raise SettingsError(f"{where}: unknown setting {name}{_nearest(name, list(kinds))}")
    given = {name: _convert(f"{where}.{name}", inner, kinds[name]) for name, inner in value.items()}
    return kind(**{**_defaults(kind), **given})


def _read(path: str, kinds: Mapping[str, Any], elsewhere: Mapping[str, type]) -> dict[str, Any]:
    """Return a file's settings by their full names. Raises SettingsError for one that is unknown or of another type."""
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
        checked[name] = _convert(f"--config {path}: {name}", value, kinds[name])
    return checked


def _takes_several_words(kind: Any) -> bool:
    """Return whether each of several words on the command line is an item of the value. A list of sections is YAML."""
    return any(get_origin(one) in (list, tuple) and not _of_sections(one) for one in (kind, *get_args(kind)))


def _is_text(kind: Any) -> bool:
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(arguments[0], str)
    return kind is str or any(map(_is_text, arguments))


def _of_sections(kind: Any) -> bool:
    """Return whether a type is a list of sections."""
    return get_origin(kind) is list and dataclasses.is_dataclass(get_args(kind)[0])


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
