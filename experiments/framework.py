"""Code that the experiments share: parts that are kept once finished, a progress bar, and the files of the result.

An experiment is cut into parts. A part is a function of its name, the scale and the options, and gives values that
JSON holds exactly. A finished part stands in `parts/` and is not computed again; the result is made from the parts as
they were read back, so that an experiment that was killed on the way ends with the same bytes as one that was not.
"""

import contextlib
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from stacey_dist.data.lock import locked
from stacey_dist.errors import SettingsError
from stacey_dist.files import replace_file
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.version import __version__

# Several runs are under way at a time, so seconds for a run would say little.
_BAR = "{desc}{percentage:3.0f}%|{bar}| {n:.1f} of {total:.0f} runs [{elapsed}, {remaining} left]"

Advance = Callable[[float], object]
"""Called with what was done since its last call, in runs."""


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
    compute: Callable[[Advance], Any]
    """Gives what JSON holds: numbers, text, lists and dicts with text as keys."""
    runs: int = 1
    """Its share of the progress bar."""


@dataclass(frozen=True)
class Outcome:
    """What an experiment found, made of its parts alone, so that equal parts give equal files."""

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
        seeds: the number of repeats; repeat i has the seed i (comparisons: 1, 2, ..., as they were tuned with 0).
        directory: where its files are.
        workers: parts that are computed at a time.
        data: a directory or file to train on, in place of the experiment's own data.
        stop: once set, parts that train save and end.
    """

    scale: Scale
    seeds: int
    directory: Path
    workers: int = 1
    data: str | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def compute(self, *groups: Mapping[Any, Part]) -> list[dict[Any, Any]]:
        """Return the values of groups of parts, each by the keys of its part.

        Parts that are finished already are read, the others computed. Parts of one name are one.
        """
        parts = {part.name: part for group in groups for part in group.values()}
        files = {name: self.directory / "parts" / f"{name}.json" for name in parts}
        left = [part for name, part in parts.items() if not files[name].exists()]
        total = sum(part.runs for part in parts.values())
        with progress(total, finished=total - sum(part.runs for part in left)) as (bar, advance):

            def compute(part: Part) -> None:
                if not self.stop.is_set():
                    bar.set_description(part.name, refresh=False)
                    write(files[part.name], dump(part.compute(advance)))

            together([partial(compute, part) for part in left], self.workers, self.stop)
        return [{key: json.loads(files[part.name].read_text()) for key, part in group.items()} for group in groups]


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
    files: tuple[str, ...] = ()
    """Patterns of the files under configs/ that state its settings, if it trains models by the launchers."""


def reproduce(
    experiment: Experiment,
    directory: Path,
    *,
    scale: str | None = None,
    seeds: int | None = None,
    workers: int = 1,
    data: str | None = None,
) -> None:
    """Run an experiment, or what is left of it, and write results.json, table.md and its figures into `directory`.

    `workers` is how many parts are computed at a time; all else is as in `Reproduction`. None is the scale's own.

    Raises:
        SettingsError: the experiment has no such scale or takes no data, there are fewer than 2 seeds or no workers,
            or the directory holds a run of another experiment, scale, number of seeds, data or version, or of other
            configuration files.
    """
    scale = next(iter(experiment.scales)) if scale is None else scale
    if scale not in experiment.scales:
        raise SettingsError(f"--scale {scale}: it must be one of {', '.join(experiment.scales)} for {experiment.name}")
    seeds = experiment.scales[scale].seeds if seeds is None else seeds
    if seeds < 2:
        raise SettingsError(f"--seeds {seeds}: it must be at least 2, for there to be a spread")
    if workers < 1:
        raise SettingsError(f"--workers {workers}: it must be at least 1")
    if data is not None and not experiment.files:
        raise SettingsError(f"--data {data}: {experiment.name} takes no data")
    settings: dict[str, Any] = {"experiment": experiment.name, "scale": scale, "seeds": seeds}
    settings |= {"data": identity_of_data(data), "versions": versions()}
    settings["scale's sizes and configuration files"] = digest(_statement(experiment, scale))
    with claimed(directory, settings):
        outcome = experiment.run(Reproduction(experiment.scales[scale], seeds, directory, workers, data))
        for name, figure in outcome.figures.items():
            _draw(figure, directory / f"{name}.png")
        write(directory / "table.md", outcome.table)
        write(directory / "results.json", dump({"settings": settings, **outcome.results}))


def _statement(experiment: Experiment, scale: str) -> bytes:
    """Return all that states what is run: finished parts with other settings must not be mixed with new ones."""
    files = sorted({file for pattern in experiment.files for file in configs().glob(pattern)})
    texts = [repr(experiment.scales[scale].settings), *(f"{file.name}\n{file.read_text()}" for file in files)]
    return "".join([*texts, launchers_defaults() if files else ""]).encode()


@contextlib.contextmanager
def progress(runs: int, finished: int = 0) -> Iterator[tuple["tqdm[Any]", Advance]]:
    """Show a bar of so many runs; give the bar, and what advances it, which threads may call."""
    lock = threading.Lock()
    with tqdm(total=runs, initial=finished, bar_format=_BAR, mininterval=1.0, smoothing=0.0) as bar:

        def advance(done: float) -> None:
            with lock:
                bar.update(min(done, runs - bar.n))  # not past the end by a rounded sum

        yield bar, advance


def _draw(figure: Figure, file: Path) -> None:
    """Write a PNG of 128 colours, a third of the size that it has with all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    reduced = io.BytesIO()
    Image.open(drawn, formats=["PNG"]).convert("RGB").quantize(128).save(reduced, format="PNG", optimize=True)
    replace_file(file, reduced.getvalue())


def together(jobs: Sequence[Callable[[], object]], workers: int, stop: threading.Event) -> None:
    """Do jobs in threads, so many at a time.

    An error of one, or Ctrl-C, sets `stop`, and is raised when all have ended.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):  # whichever ends first: an error stops the others at once
                future.result()
        except BaseException:
            stop.set()  # what runs saves and ends, what waits does not begin
            raise


@contextlib.contextmanager
def claimed(directory: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Work in a directory that is marked with the settings, alone: another process that wants to, waits.

    Raises SettingsError where it is marked with others: what is there would be mixed with what comes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock"):
        file = directory / "settings.json"
        if not file.exists():
            if any((directory / name).exists() for name in ("parts", "tuning")):
                raise SettingsError(
                    f"--out {directory}: it must be another directory, for this one holds results and no "
                    "settings.json, which would say of what data and version they are"
                )
            write(file, dump(settings))
        there = json.loads(file.read_text())
        for name, value in settings.items():
            found = there.get(name)
            if found == value:
                continue
            if isinstance(found, dict) and isinstance(value, dict):
                names = sorted(key for key in found.keys() | value.keys() if found.get(key) != value.get(key))
                found, value = ({key: one.get(key) for key in names} for one in (found, value))
            raise SettingsError(
                f"--out {directory}: it must be another directory, for this one holds a run with {name} {found}, not "
                f"{value}"
            )
        yield


def configs() -> Path:
    """Return the repository's directory of configurations."""
    return Path(__file__).parents[1] / "configs"


_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "optuna",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "datasets",
    "accelerate",
    "lion-pytorch",
    "pytorch-optimizer",
)
# A run that is resumed with other code than it began with would mix the results of both.
_CODE = ("experiments", "stacey_dist/optim", "stacey_dist/training", "stacey_dist/models", "stacey_dist/data")


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on, as far as it is installed, and the digest of the code."""
    code = [file for part in _CODE for file in sorted((configs().parent / part).rglob("*.py"))]
    found = {"stacey_dist": __version__, "code": digest(b"".join(file.read_bytes() for file in code))}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def launchers_defaults() -> str:
    """Return what configuration files leave to the launchers."""
    configs = [launcher.config() for launcher in LAUNCHERS.values()]
    return "".join(f"{config!r}{config.optimizer.defaults!r}" for config in configs)


def identity_of_data(data: str | None) -> str | None:
    """Return the user's data, which are the same from wherever they are named; of a file, with its size."""
    if data is None:
        return None
    paths = [os.path.abspath(path) for path in data.split(",")]
    return ",".join(f"{path} of {os.path.getsize(path)} bytes" if os.path.isfile(path) else path for path in paths)


def digest(content: bytes) -> str:
    """Return a name for what is too long to be shown."""
    return f"of sha256 {hashlib.sha256(content).hexdigest()[:12]}"


def dump(value: Any) -> str:
    """Return JSON, which holds Python's floats exactly, but no NaN and no infinity: ValueError."""
    return json.dumps(value, allow_nan=False) + "\n"


def write(file: Path, text: str) -> None:
    """Write a file, which is there in whole or not at all, and its directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode())
