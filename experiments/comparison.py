"""A fair comparison of optimizers: each is tuned with as many runs, then the best settings are run with new seeds.

The ranges stand in configs/sweeps/TASK/OPTIMIZER.yaml, which `wandb sweep` and `python -m experiments tune` read too.
Tuning runs have the seed 0; those that are compared have 1, 2, ..., so that no optimizer is judged by the runs that
selected its settings. Then p is varied, and all else stays as it was found. At the scale of the paper nothing is tuned:
its settings are in configs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from experiments.comparison_figures import curves, curves_by_p, search
from experiments.comparison_report import report
from experiments.framework import Advance, Outcome, Part, Reproduction, configs
from experiments.sweep import Sweep, read_sweep
from experiments.trial import Interrupted, Result, Trial, data_settings, threads_each
from experiments.tuning import Tuner
from stacey_dist.errors import SettingsError

PAPER_OPTIMIZERS = ("sgd", "adam", "adamw", "lion", "stacey_p2", "stacey_pp", "stacey_2p")


@dataclass(frozen=True)
class Size:
    """What a scale makes of a comparison.

    Args:
        optimizers: the optimizers to compare, in the order of the table. Each has a sweep, or a configuration file.
        sweeps: the directory under configs/ with a sweep for each optimizer; None where nothing is tuned.
        trials: runs to tune an optimizer with.
        configs: the pattern of a configuration file under configs/ for each optimizer, where nothing is tuned; its
            braces stand for the optimizer, or STACEY's variant.
        overrides: settings that win over all others.
        without_data: further ones, where the user names no data.
        vary_p: what p is set to, by variant, in further runs with the first seed.
    """

    optimizers: tuple[str, ...]
    sweeps: str | None = None
    trials: int = 0
    configs: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    without_data: Mapping[str, Any] = field(default_factory=dict)
    vary_p: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is trained, and how it is judged.

    Args:
        program: the launcher.
        metric: a held-out figure, as in metrics.jsonl.
    """

    program: str
    metric: str


def compare(task: Task, reproduction: Reproduction) -> Outcome:
    """Tune, run with new seeds, vary p, and report; the scale's settings hold a `Size` by the name of "size"."""
    size: Size = reproduction.scale.settings["size"]
    given = data_settings(task.program, reproduction.directory, reproduction.data, size.without_data)
    overrides = {**size.overrides, **given}
    chosen, searched = _settings(task, size, reproduction, overrides)
    if not chosen:
        raise SettingsError(f"{reproduction.directory}: no run of any optimizer was completed; look at the ranges")
    first, *_ = seeds = range(1, reproduction.seeds + 1)

    def part(name: str, seed: int, label: str = "", **changed: Any) -> Part:
        config, settings = chosen[name]
        own = {**settings, **overrides, "seed": seed, **changed}
        return training(reproduction, task.program, config, own, f"{name}{label}-seed{seed}")

    runs = {(name, seed): part(name, seed) for name in chosen for seed in seeds}
    varied = {
        (name, p): part(name, first, f"-p{p:g}", **{"optimizer.p": p})
        for name, values in size.vary_p.items()
        if name in chosen
        for p in values
    }
    found, by_p = results(reproduction, runs, varied)
    settings = {name: own for name, (_, own) in chosen.items()}
    values, table = report(found, task.metric, settings, searched, by_p)
    figures = {"curves": curves(found, task.metric)}
    if searched:
        figures["search"] = search(searched, task.metric)
    if by_p:
        figures["p"] = curves_by_p(by_p, task.metric)
    return Outcome(values, table, figures)


Chosen = dict[str, tuple[Path, dict[str, Any]]]
"""The configuration file and the settings on top of it, by optimizer."""


def _settings(
    task: Task, size: Size, reproduction: Reproduction, overrides: dict[str, Any]
) -> tuple[Chosen, dict[str, list[dict[str, Any]]]]:
    """Return what each optimizer is run with, unless none of its runs was completed; and the trials of all."""
    if size.sweeps is None:
        return {
            name: (configs() / size.configs.format(name.removeprefix("stacey_")), {}) for name in size.optimizers
        }, {}
    sweeps = {name: read_sweep(configs() / size.sweeps / f"{name}.yaml") for name in size.optimizers}
    for name, sweep in sweeps.items():
        if (sweep.program, sweep.metric) != (task.program, task.metric):
            raise SettingsError(f"{size.sweeps}/{name}.yaml: it must be of {task.program} and {task.metric}")
    parts = {name: tuning(reproduction, name, sweep, size.trials, overrides) for name, sweep in sweeps.items()}
    (searched,) = reproduction.compute(parts)
    best = {name: rows[0]["settings"] for name, rows in searched.items() if rows[0]["state"] == "complete"}
    return {name: (sweeps[name].config, {**sweeps[name].fixed, **own}) for name, own in best.items()}, searched


def training(reproduction: Reproduction, program: str, config: Path, settings: dict[str, Any], name: str) -> Part:
    """Return a training run as a part; `results` gives what it found."""
    trial = Trial(program, config, settings, reproduction.directory / "runs" / name, threads_each(reproduction.workers))
    return Part(name, partial(train, reproduction, trial))


def results(reproduction: Reproduction, *groups: Mapping[Any, Part]) -> list[dict[Any, Result]]:
    """Compute groups of training runs; return the results of each by the keys of its parts."""
    return [{key: Result(**value) for key, value in found.items()} for found in reproduction.compute(*groups)]


def train(reproduction: Reproduction, trial: Trial, advance: Advance) -> dict[str, Any]:
    """Run a trial as a part of an experiment, or what is left of it; return its `Result` as a dictionary."""
    result = trial.run(stop=reproduction.stop, advance=advance)
    if result is None:
        raise Interrupted
    return asdict(result)


def tuning(reproduction: Reproduction, name: str, sweep: Sweep, trials: int, overrides: dict[str, Any]) -> Part:
    """Return the search of an optimizer's settings, with seed 0, as a part; its value is what `Tuner.run` returns."""

    def compute(advance: Advance) -> list[dict[str, Any]]:
        tuner = Tuner(
            sweep,
            reproduction.directory / "tuning" / name,
            trials=trials,
            overrides={"seed": 0, **overrides},
            threads=threads_each(reproduction.workers),
            stop=reproduction.stop,
            advance=advance,
        )
        return tuner.run()

    return Part(f"tune-{name}", compute, runs=trials)
