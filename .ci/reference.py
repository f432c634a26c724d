"""The reference pages that are made from the code: every setting of the launchers, every option of the commands."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from experiments import __main__ as experiments
from stacey_dist import cli
from stacey_dist.plan import command as plan
from stacey_dist.training import prepare_command
from stacey_dist.training.settings.config import RunConfig
from stacey_dist.training.settings.image_config import ImageConfig
from stacey_dist.training.settings.llm_config import LLMConfig

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
MADE = "<!-- made by `python .ci/pages.py` -->"
PREPARE = "tokenize the text of a configuration of train_llm.py before the run"
SHARED = ("optimizer", "schedule", "train", "checkpoint", "tracking", "hub")


def pages() -> dict[Path, str]:
    """Return the text of each page."""
    return {REFERENCE / "settings.md": settings(), REFERENCE / "commands.md": commands()}


def settings() -> str:
    """Return the page of the launchers' settings."""
    llm, images = LLMConfig(), ImageConfig()
    lines = [
        "# Settings",
        "",
        MADE,
        "",
        "Every setting of `train_llm.py` and `train_imagenet.py`. On the command line a setting is",
        "`--section.name value`. In a YAML file that `--config` names it is `section: {name: value}`. Options win over",
        "files, and later ones over earlier ones. `null` stands for no value.",
        "[How to choose them](../how-to/settings.md)",
        "",
        "## Both programs",
        "",
        *table(["setting", "text", "images", "allowed", "meaning"], top(llm, images)),
    ]
    for section in SHARED:
        lines += ["", f"### {section}", "", summary(getattr(llm, section)), ""]
        there = {row[0]: row[1] for row in rows(getattr(images, section), section)}
        of_text = rows(getattr(llm, section), section)
        cells = [[name, here, there[name], allowed, about] for name, here, allowed, about in of_text if name in there]
        lines += table(["setting", "text", "images", "allowed", "meaning"], cells)
        if section == "optimizer":
            for what, config in (("text", llm), ("images", images)):
                lines += ["", f"The default numbers of each optimizer for {what}:", ""]
                lines += own_numbers(config.optimizer.defaults)
    for program, config in (("train_llm.py", llm), ("train_imagenet.py", images)):
        lines += ["", f"## {program} alone"]
        shared = {row[0] for name in SHARED for row in rows(getattr(RunConfig(), name), name)}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                own = [row for row in rows(value, field.name) if field.name not in SHARED or row[0] not in shared]
                if own:
                    described = [summary(value), ""] if field.name not in SHARED else []
                    lines += ["", f"### {field.name}" + (" of images" if config is images else ""), "", *described]
                    lines += table(["setting", "default", "allowed", "meaning"], own)
    return "\n".join(lines) + "\n"


def summary(section: Any) -> str:
    """Return a section's docstring in one line."""
    return " ".join((type(section).__doc__ or "").split())


def own_numbers(defaults: Any) -> list[str]:
    """Return the table of each optimizer's own default numbers."""
    names = list(dict.fromkeys(name for numbers in defaults.values() for name in numbers))
    cells = [
        [method, *(f"`{shown(numbers[name])}`" if name in numbers else "" for name in names)]
        for method, numbers in defaults.items()
    ]
    return table(["optimizer", *(f"`{name}`" for name in names)], cells)


def top(llm: Any, images: Any) -> list[list[str]]:
    """Return the rows of the settings that are in no section."""
    here = [row for row in rows(llm, "") if "." not in row[0]]
    return [[n, value, f"`{getattr(images, n.strip('`'))}`", allowed, about] for n, value, allowed, about in here]


def rows(section: Any, name: str) -> Iterator[list[str]]:
    """Yield name, default, allowed values and meaning of each setting of a section."""
    kinds, about = get_type_hints(type(section), include_extras=True), documentation(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if not dataclasses.is_dataclass(value):
            full = f"{name}.{field.name}".removeprefix(".")
            yield [f"`{full}`", f"`{shown(value)}`", allowed(kinds[field.name]), about[field.name]]
            for kind in filter(
                inspect.isclass, filter(dataclasses.is_dataclass, get_args(kinds[field.name]))
            ):  # of a list of sections
                shared = {f"`{full}[i].{other.name}`" for other in dataclasses.fields(section)}
                yield from (row for row in rows(kind(), f"{full}[i]") if row[0] not in shared)


def shown(value: Any) -> str:
    """Return a default as YAML has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)


def allowed(kind: Any) -> str:
    """Return which values a type admits."""
    inner = get_args(kind)
    if dataclasses.is_dataclass(kind):
        return "settings"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if get_origin(kind) is Annotated:
        words = inner[1].words  # "within [0, 1]" follows the type, "a finite number >= 0" has it
        return words if words.startswith(("a ", "the ")) else f"{allowed(inner[0])} {words}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("`null`" if one is NoneType else allowed(one) for one in inner)
    if get_origin(kind) is list:
        return f"list: {allowed(inner[0])}"
    if get_origin(kind) is tuple:
        return f"{len(inner)} × {allowed(inner[0])}"
    return {int: "integer", float: "number", bool: "`true`, `false`", str: "text"}[kind]


def documentation(kind: type) -> dict[str, str]:
    """Return the text below each field of a dataclass, those that it inherits included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for before, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = " ".join(ast.literal_eval(after.value).split())
                found[ast.unparse(before.target)] = text.replace("None: ", "`null`: ").replace(" null: ", " `null`: ")
    return found


def table(header: list[str], cells: Any) -> list[str]:
    """Return the lines of a table."""
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in [header, *cells])
    head, *body = (f"| {line} |" for line in lines)
    return [head, "|" + "---|" * len(header), *body]


def commands() -> str:
    """Return the page of the commands."""
    lines = [
        "# Commands",
        "",
        MADE,
        "",
        "`train_llm.py` and `train_imagenet.py` are started by `accelerate launch`; their options are the",
        "[settings](settings.md). `stacey-dist prepare` takes the settings of `train_llm.py`, and `stacey-dist plan`",
        "takes them beside its own options. Each program prints this with `--help`.",
    ]
    lines += describe(cli.make_parser(), "stacey-dist", skip=("plan", "prepare"))
    lines += describe(plan._parser(), "stacey-dist plan")
    lines += describe(prepare_command.own_options(), "stacey-dist prepare", short=PREPARE)
    lines += describe(experiments.make_parser(), "python -m experiments")
    return "\n".join(lines) + "\n"


def describe(parser: argparse.ArgumentParser, name: str, skip: tuple[str, ...] = (), short: str = "") -> list[str]:
    """Return the lines about a command and those below it; `short` is what the command above says of it."""
    below: list[str] = []
    cells: list[list[str]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {each.dest: each.help or "" for each in action._choices_actions}
            for word, inner in action.choices.items():
                below += [] if word in skip else describe(inner, f"{name} {word}", short=helps[word])
        elif not action.option_strings:
            name += f" {str(action.metavar or action.dest).upper()}"
            cells += [[f"`{name.split()[-1]}`", action.help]] if action.help else []
        elif action.help != argparse.SUPPRESS and not {"--help", "--version"} & set(action.option_strings):
            value = "" if action.nargs == 0 else f" {metavar(action)}"
            text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
            cells.append([f"`{', '.join(action.option_strings)}{value}`", text])
    about = " ".join((parser.description or short).split())
    lines = ["", f"## {name}", "", f"{about[:1].upper()}{about[1:]}".rstrip(".") + "."]
    return [
        *(lines if cells or not below else []),
        *(["", *table(["option", "meaning"], cells)] if cells else []),
        *below,
    ]


def metavar(action: argparse.Action) -> str:
    """Return what stands for an option's value."""
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())
