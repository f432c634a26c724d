"""Does the coupling pay in long runs? Equal budgets, 10 000 updates; docs/results/long-runs.md has the protocol."""

import math
from typing import Any

from experiments.comparison import results, training, tuning
from experiments.comparison_figures import curves
from experiments.comparison_report import LOOKS, report, table_of_losses
from experiments.framework import Experiment, Outcome, Part, Reproduction, Scale, configs
from experiments.llm import TASK
from experiments.sweep import Sweep, read_sweep
from experiments.trial import Result, data_settings
from stacey_dist.errors import SettingsError

_SWEEPS = "sweeps/long"
# Each learning rate of an optimizer that has two; tau of (p,p) is one.
_HALVED = {"stacey_pp": ("optimizer.lr", "optimizer.tau"), "muon": ("optimizer.lr", "optimizer.adamw_lr")}
_COUPLED = ("stacey_pp", "stacey_p2")
_PROXY = {"train.max_steps": 1500, "train.eval_every_steps": 250}
_AT_A_TIME = 2  # optimizers: the first are compared before the last are tuned


def run(reproduction: Reproduction) -> Outcome:
    """Tune every optimizer with short runs, choose between two long ones, and run the choice with new seeds."""
    size = reproduction.scale.settings
    overrides = data_settings(TASK.program, reproduction.directory, reproduction.data, {})
    sweeps = {name: read_sweep(configs() / _SWEEPS / f"{name}.yaml") for name in size["optimizers"]}
    found: dict[tuple[str, int], Result] = {}
    searched: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for start in range(0, len(sweeps), _AT_A_TIME):
        names = list(sweeps)[start : start + _AT_A_TIME]
        short = {**overrides, **size["proxy"]}
        parts = {name: tuning(reproduction, name, sweeps[name], size["proxies"], short) for name in names}
        (proxies,) = reproduction.compute(parts)
        searched |= proxies
        names = [name for name in names if searched[name][0]["state"] == "complete"]
        candidates = {name: _candidates(name, sweeps[name], searched[name][0]["settings"]) for name in names}
        long = {
            (name, label): _long(reproduction, sweeps[name], {**settings, **overrides}, 0, f"{name}-{label}")
            for name in names
            for label, settings in candidates[name].items()
        }
        (tried,) = results(reproduction, long)
        for name in names:
            losses = {label: _loss(tried[name, label]) for label in candidates[name]}
            chosen[name] = candidates[name][min(losses, key=losses.__getitem__)]
        runs = {
            (name, seed): _long(reproduction, sweeps[name], {**chosen[name], **overrides}, seed, name)
            for seed in range(1, reproduction.seeds + 1)
            for name in names
        }
        found |= results(reproduction, runs)[0]
    if not chosen:
        raise SettingsError(f"{reproduction.directory}: no run of any optimizer was completed; look at the ranges")
    values, table = report(found, TASK.metric, chosen, searched)
    figures = {"curves": curves(found, TASK.metric), "time": curves(found, TASK.metric, over_time=True)}
    if not size["wsd"]:
        return Outcome(values, table, figures)
    compared = values["optimizers"]
    means = {name: compared[name]["mean"] for name in _COUPLED if name in compared}
    means = {name: mean for name, mean in means.items() if mean is not None}
    names = [name for name in ("adamw", min(means, key=means.__getitem__, default="")) if name in chosen]
    wsd = {**overrides, "schedule.name": "wsd"}
    parts = {name: _long(reproduction, sweeps[name], {**chosen[name], **wsd}, 1, f"{name}-wsd") for name in names}
    (decayed,) = results(reproduction, parts)
    ends = {name: result.final(TASK.metric) for name, result in decayed.items()}
    labelled = {LOOKS[name].label: loss for name, loss in ends.items()}
    table += table_of_losses("with wsd, seed 1", labelled, TASK.metric)
    return Outcome({**values, "wsd": ends}, table, figures)


def _candidates(name: str, sweep: Sweep, best: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of the long runs: those of the best short run, and with half of its learning rate."""
    settings = {**sweep.fixed, **best}
    halved = {setting: settings[setting] / 2 for setting in _HALVED.get(name, ("optimizer.lr",))}
    return {"as-found": settings, "halved": {**settings, **halved}}


def _loss(result: Result) -> float:
    """Return the loss after the last update; infinity if the run diverged."""
    loss = result.final(TASK.metric)
    return math.inf if loss is None else loss


def _long(reproduction: Reproduction, sweep: Sweep, settings: dict[str, Any], seed: int, name: str) -> Part:
    return training(reproduction, TASK.program, sweep.config, {**settings, "seed": seed}, f"{name}-seed{seed}")


EXPERIMENT = Experiment(
    "long",
    "not in the paper: does the coupling pay in long runs? LLaMA, 20 M tokens",
    {
        "cpu": Scale(
            "0.9 M parameters, 10 000 updates, 6 short and 2 long runs to tune each; a day on two cores",
            3,
            {
                "optimizers": ("adamw", "stacey_pp", "stacey_p2", "muon", "ademamix", "lion", "stacey_uncoupled"),
                "proxies": 6,
                "proxy": _PROXY,
                "wsd": True,
            },
        ),
        "pair": Scale(
            "the first two optimizers of `cpu`; six hours",
            3,
            {"optimizers": ("adamw", "stacey_pp"), "proxies": 6, "proxy": _PROXY, "wsd": False},
        ),
    },
    run,
    files=(f"{_SWEEPS}/*.yaml",),
)
