"""What the experiments share: parts that are kept once finished, a progress bar, and the files of the result.

An experiment is cut into parts. A part is a function of its name, the scale and the number of seeds, and gives values
that JSON holds exactly. A finished part stands in `parts/` and is not computed again; the result is made from the parts
as they were read back, so that an experiment that was killed on the way ends with the same bytes as one that was not.
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from stacey_dist.errors import SettingsError
from stacey_dist.version import __version__

# Told how many updates were made since it was last called.
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Scale:
    """A size that an experiment can be run at."""

    description: str
    seeds: int
    """Repeats, if the user does not say."""
    settings: Mapping[str, Any]
    """What the experiment itself makes of the scale."""


@dataclass(frozen=True)
class Part:
    """A piece of an experiment that is computed in one go."""

    name: str
    """The name of its file too."""
    updates: int
    """The length of its share of the progress bar."""
    compute: Callable[[Advance], Any]
    """Gives what JSON holds: numbers, text, lists and dicts with text as keys."""


@dataclass(frozen=True)
class Outcome:
    """What an experiment found, made of its parts alone: without times, so that equal parts give equal files."""

    results: dict[str, Any]
    table: str
    """Markdown."""
    figures: Mapping[str, Figure]
    """By the name of the file, without .png."""


@dataclass(frozen=True)
class Reproduction:
    """One run of an experiment.

    Args:
        scale: the scale it is run at.
        seeds: the number of repeats; repeat i has the seed i.
        directory: where its files are.
    """

    scale: Scale
    seeds: int
    directory: Path

    def compute(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The values of all parts by their names; those that are finished already are read, the others computed."""
        files = {part.name: self.directory / "parts" / f"{part.name}.json" for part in parts}
        finished = sum(part.updates for part in parts if files[part.name].exists())
        total = sum(part.updates for part in parts)
        with tqdm(total=total, initial=finished, unit=" updates", unit_scale=True, mininterval=1.0) as bar:
            for part in parts:
                if not files[part.name].exists():
                    bar.set_description(part.name)
                    write(files[part.name], dump(part.compute(bar.update)))
        return {name: json.loads(file.read_text()) for name, file in files.items()}


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Args:
        name: what the user calls it.
        description: one line.
        scales: by their names; the first is taken if the user does not say.
        run: computes its parts and reports on them.
    """

    name: str
    description: str
    scales: Mapping[str, Scale]
    run: Callable[[Reproduction], Outcome]


def reproduce(experiment: Experiment, scale: str | None, seeds: int | None, directory: Path) -> None:
    """Run an experiment, or what is left of it, and write results.json, table.md and its figures into `directory`.

    Raises:
        SettingsError: the experiment has no such scale, there are fewer than 2 seeds, or the directory holds a run of
            another experiment, scale, number of seeds or version.
    """
    scale = next(iter(experiment.scales)) if scale is None else scale
    if scale not in experiment.scales:
        raise SettingsError(f"--scale {scale}: it must be one of {', '.join(experiment.scales)} for {experiment.name}")
    seeds = experiment.scales[scale].seeds if seeds is None else seeds
    if seeds < 2:
        raise SettingsError(f"--seeds {seeds}: it must be at least 2, for there to be a spread")
    versions = {"stacey_dist": __version__, "torch": torch.__version__}
    settings = {"experiment": experiment.name, "scale": scale, "seeds": seeds, "versions": versions}
    _claim(directory, settings)
    outcome = experiment.run(Reproduction(experiment.scales[scale], seeds, directory))
    for name, figure in outcome.figures.items():
        _draw(figure, directory / f"{name}.png")
    write(directory / "table.md", outcome.table)
    write(directory / "results.json", dump({"settings": settings, **outcome.results}))


def _draw(figure: Figure, file: Path) -> None:
    """Write a PNG of 128 colours, a third of the size that it has with all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    temporary = file.with_name(file.name + ".tmp")
    Image.open(drawn).convert("RGB").quantize(128).save(temporary, format="PNG", optimize=True)
    os.replace(temporary, file)


def _claim(directory: Path, settings: dict[str, Any]) -> None:
    """Mark a directory with the settings; refuse one that is marked with others: its parts would be mixed with ours."""
    file = directory / "settings.json"
    if not file.exists():
        write(file, dump(settings))
    there = json.loads(file.read_text())
    for name, value in settings.items():
        if there.get(name) != value:
            raise SettingsError(
                f"--out {directory}: it must be another directory, for this one holds a run with {name} "
                f"{there.get(name)}, not {value}"
            )


def dump(value: Any) -> str:
    """JSON, which holds Python's floats exactly, but no NaN and no infinity: ValueError."""
    return json.dumps(value, allow_nan=False) + "\n"


def write(file: Path, text: str) -> None:
    """Write a file so that it is there in whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)
