"""Random settings give a valid configuration, or one line and status 2: never another exception, never a hang."""

import random

import pytest
import yaml

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.training.settings.command_line import _fields, flatten, to_dict

SCALARS = [
    *[
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "16",
        "0.5",
        "-0.0",
        "1e-8",
        "1e308",
        "-1e308",
        "1e309",
        "1e-400",
        ".inf",
        "-.inf",
        ".nan",
        "inf",
        "nan",
        "null",
        "~",
        "true",
        "false",
    ],
    *[
        "yes",
        "no",
        "on",
        "off",
        "12:30:45",
        "2001-01-01",
        "0x10",
        "010",
        "1_000",
        "9223372036854775807",
        "9223372036854775808",
    ],
    *[
        "stacey",
        "adamw",
        "sgd",
        "lion",
        "pp",
        "2p",
        "cosine",
        "bf16",
        "fp16",
        "zeros",
        "bfloat16",
        "wandb",
        "a/b.txt",
        "~/x",
        "/",
        "--seed",
    ],
    *["%", "*", "*a", "@x", "`x`", "#", "|", ">", "[", "]", "{", "}", ",", "=", "<<", "!!python/name:os.x"],
    *["", "''", '"7"', '"', "'", "\t", "a\0b", "é", "\U0001f600", "9" * 250, "9" * 5000],
    *["&a x", "!!int 3", "- x", "? x", ": x", "x: y"],
]
COLLECTIONS = ["[]", "{}", "[1]", "[1, 2]", "[0.9, 0.95]", "[a, b]", "[null]", "[[1]]", "{a: 1}", "[a: 1]", "[.nan, 1]"]
SYNTAX = [*":-?[]{},#&*!|>'\"%@` \n\t~<=.0e\0\x85\u2028", "---\n", "...\n", "<<: ", "&a ", "*a", "!!set "]
STRAY = ["--", "-", "x", "", "-x", "--=", "--config", "@x"]


def outcome(launcher, arguments, capsys):
    """Return the configuration, or the line that refuses it."""
    try:
        config = launcher.parse(arguments, "program")
    except SettingsError as error:
        lines = [str(error)]
    except SystemExit:
        *lines, hint = capsys.readouterr().err.splitlines()
        assert hint == "Try 'program --help' for every setting."
    else:
        return config
    assert len(lines) == 1, (arguments, lines)
    assert len(lines[0]) < 6000, arguments
    return lines[0]


def value(rng):
    return rng.choice(SCALARS if rng.random() < 0.8 else COLLECTIONS)


def options(rng, names):
    """Return a command line of random settings."""
    arguments = []
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(names)
        if rng.random() < 0.1:
            name = "".join(rng.choice([c, "", c + c, ".", "x"]) if rng.random() < 0.1 else c for c in name)
        arguments += [f"--{name}={value(rng)}"] if rng.random() < 0.5 else [f"--{name}", value(rng)]
    if rng.random() < 0.1:
        arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(STRAY))
    return arguments


def file_text(rng, names, template):
    """Return YAML: settings of which some are random, with characters of its syntax put in or taken out."""
    if rng.random() < 0.5:
        text = "".join(f"{name}: {value(rng)}\n" for name in rng.sample(names, rng.randint(1, 5)))
    else:
        text = template
    characters = list(text)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        place = rng.randrange(len(characters) + 1)
        kind = rng.random()
        if kind < 0.4:
            characters.insert(place, rng.choice(SYNTAX))
        elif kind < 0.7:
            del characters[place : place + rng.randint(1, 4)]
        else:  # a part of the text again: keys twice, sections in sections
            start = rng.randrange(len(characters) + 1)
            characters[place:place] = characters[start : start + rng.randint(1, 200)]
    return "".join(characters)


@pytest.mark.parametrize(
    ("seed", "cases"),
    [(0, 60), *(pytest.param(seed, 1000, marks=pytest.mark.exhaustive) for seed in range(1, 6))],
)
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_random_settings(launcher, seed, cases, tmp_path, capsys):
    rng, config_class = random.Random(seed), launcher.config
    names = [name for name, _ in _fields(config_class)]
    template = yaml.safe_dump(to_dict(config_class()), sort_keys=False)
    path = tmp_path / "fuzz.yaml"
    accepted = refused = 0
    for _ in range(cases):
        if rng.random() < 0.5:
            arguments = options(rng, names)
        else:
            path.write_text(file_text(rng, names, template))
            arguments = ["--config", str(path)]
        config = outcome(launcher, arguments, capsys)
        if isinstance(config, config_class):
            accepted += 1
            assert yaml_files.load(yaml_files.dump(to_dict(config)), "again") == to_dict(config)
        else:
            refused += 1
            about = flatten(to_dict(config_class())).keys() | {"--", "fuzz.yaml", "an option"}
            assert any(name in config for name in about), (arguments, config)
    assert accepted > cases / 20
    assert refused > cases / 5
