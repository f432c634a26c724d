"""A configuration from YAML files and command-line options.

jsonargparse does the parsing, the types and `--help`; this adds the nearest right name for a mistyped one.
"""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from stacey_dist.errors import SettingsError

Config = TypeVar("Config")


def parse(config_class: type[Config], arguments: Sequence[str] | None = None, program: str | None = None) -> Config:
    """The configuration of `arguments` (default: the command line): defaults, then --config files, then options.

    `program` is the name in messages (default: the program's own).

    Prints the help and exits for --help; prints the error and exits with status 2 for a bad option, an unknown
    name (with the nearest right one) or a value of the wrong type.
    """
    arguments = list(_as_yaml(config_class, sys.argv[1:] if arguments is None else arguments))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--section.name value ...]",
        description=f"{(config_class.__doc__ or '').strip()} Every setting can be given in a YAML file (--config) and "
        "as an option (--section.name value); later ones win.",
    )
    parser.add_argument("--config", action="config", help="A YAML file of settings.")
    parser.add_class_arguments(config_class, as_group=False)
    parser.kinds = dict(_fields(config_class))
    known = ["config", *parser.kinds]
    try:
        _check_options(arguments, known)
        _check_files(arguments, parser.kinds, config_class)
    except SettingsError as error:
        parser.error(str(error))
    parsed = parser.instantiate(parser.parse_args(arguments))
    values = {field.name: parsed[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return config_class(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists and numbers, as YAML and JSON can hold."""
    plain: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False) or "")
    return plain


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class _Parser(ArgumentParser):
    kinds: dict[str, Any]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error without the usage, and a value of a wrong type in one line; exit with status 2."""
        key = re.search(r'Parser key "([\w.]+)":', message)
        value = re.search(r"(?:Got|Given) value: (.*)", message)
        if key and value and key[1] in self.kinds:
            message = f"{key[1]}: {value[1]} is not allowed; it must be {_describe(self.kinds[key[1]])}"
        print(f"{self.prog}: error: {message.strip()}", file=sys.stderr)
        print(f"Try '{self.prog} --help' for every setting.", file=sys.stderr)
        sys.exit(2)


def _describe(kind: Any) -> str:
    """A type in a user's words."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(kind) is list:
        return f"a list, each {_describe(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"{len(arguments)} values, each {_describe(arguments[0])}"
    if type(None) in arguments:
        return " or ".join(_describe(other) for other in arguments if other is not type(None)) + ", or null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, str(kind))


def _as_yaml(config_class: Any, arguments: Sequence[str]) -> Iterator[str]:
    """Options as a person types them, `--data.files a.txt` or `--optimizer.p inf`, with values as YAML wants them."""
    lists = {f"--{name}" for name, kind in _fields(config_class) if get_origin(kind) is list}
    tuples = {f"--{name}" for name, kind in _fields(config_class) if get_origin(kind) is tuple}
    option = ""
    for argument in arguments:
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
        else:
            option, equals, value = option, "", argument
        if value == "inf":
            value = ".inf"
        elif option in lists and value and not value.startswith("["):
            value = json.dumps(value.split(","))
        elif option in tuples and value and not value.startswith("["):
            value = f"[{value}]"
        if not argument.startswith("--"):
            yield value
        else:
            yield option + equals + value


def _fields(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's full name and type."""
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.type


def _check_options(arguments: Sequence[str], known: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("--") and argument not in ("--help", "--print_config"):
            name = argument[2:].split("=")[0].removesuffix("+")
            if not name.startswith("print_config") and name not in known:
                raise SettingsError(f"unknown option --{name}{_nearest(name, known, '--')}")


def _check_files(arguments: Sequence[str], kinds: Mapping[str, Any], config_class: Any) -> None:
    """Raise SettingsError for what jsonargparse does not find in files, or tells of in words of its own."""
    known = ["config", *kinds]
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            path = Path(arguments[index + 1])
        elif argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
        else:
            continue
        try:
            settings = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--config {path}: cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise SettingsError(f"--config {path}: is not valid YAML: {error}") from error
        if not isinstance(settings, dict):
            raise SettingsError(f"--config {path}: it must hold settings, as in 'train: {{max_steps: 100}}'")
        sections = {name.split(".")[0] for name in known if "." in name}
        for section in sections & settings.keys():
            if not isinstance(settings[section], dict):
                raise SettingsError(f"--config {path}: {section} must hold settings, not {settings[section]!r}")
        for name, value in flatten(settings).items():
            if value == "inf":
                raise SettingsError(f"--config {path}: {name}: YAML writes infinity as .inf")
            if name not in known:
                hint = _launcher_that_knows(name, config_class) or _nearest(name, known)
                raise SettingsError(f"--config {path}: unknown setting {name}{hint}")
            kind, is_bool = kinds.get(name), isinstance(value, bool)
            kinds_of_value = (kind, *get_args(kind))
            if is_bool and bool not in kinds_of_value:
                raise SettingsError(
                    f"--config {path}: {name}: {str(value).lower()} is not allowed; it must be {_describe(kind)} "
                    '(YAML reads no and yes as false and true: write "no" in quotes)'
                )
            if value is None and type(None) not in kinds_of_value:
                raise SettingsError(f"--config {path}: {name}: null is not allowed; it must be {_describe(kind)}")


def _launcher_that_knows(name: str, config_class: Any) -> str:
    """Who takes a setting that this program does not, for people; empty if it is nobody."""
    from stacey_dist.training import image_config, llm_config  # they import this module

    launchers = {"train_llm.py": llm_config.LLMConfig, "train_imagenet.py": image_config.ImageConfig}
    for program, other in launchers.items():
        if other is not config_class and name in dict(_fields(other)):
            return f"; it is one of {program}"
    return ""


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    # A right name in the wrong section, or without one, is nearer than one that is spelled alike.
    same_end = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    best = (same_end or close)[:1]
    return f"; did you mean {prefix}{best[0]}?" if best else ""
