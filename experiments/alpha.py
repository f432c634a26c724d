"""Does an alpha that grows over the run help (p,p) in long runs? docs/results/long-runs.md has the protocol."""

from typing import Any

from experiments.comparison import results, training
from experiments.comparison_figures import curves
from experiments.comparison_report import report, table_of_losses
from experiments.framework import Experiment, Outcome, Part, Reproduction, Scale, configs
from experiments.llm import TASK
from experiments.trial import data_settings

_CONFIG = "sweeps/long/base.yaml"
_QUICKSTART = "llm/quickstart.yaml"
_RATES = ("optimizer.lr", "optimizer.tau")  # tau of (p,p) is a learning rate at large p


def run(reproduction: Reproduction) -> Outcome:
    """Compare growths of alpha in short runs with seed 0, and one with new seeds: short, long and quickstart."""
    size = reproduction.scale.settings
    given = data_settings(TASK.program, reproduction.directory, reproduction.data, {})

    def part(name: str, label: str, seed: int, updates: int, **changed: Any) -> Part:
        own = {**size["runs"][name], **given, **changed, "seed": seed, "train.max_steps": updates}
        return training(reproduction, TASK.program, configs() / _CONFIG, own, f"{label}-{updates}-seed{seed}")

    short = {"AdamW": part("adamw", "adamw", 0, size["short"])}
    for at_end in size["final_alpha"]:
        label = f"stacey_pp-alpha{'' if at_end is None else f'-to-{at_end:g}'}"
        changed = {"schedule.final_alpha": at_end}
        title = f"STACEY(p,p), α {'constant' if at_end is None else f'grows to {at_end:g}'}"
        short[title] = part("stacey_pp", label, 0, size["short"], **changed)
    (found_short,) = results(reproduction, short)
    ends = {title: result.final(TASK.metric) for title, result in found_short.items()}
    new = [(name, seed) for seed in range(1, reproduction.seeds + 1) for name in size["runs"]]
    again = {(name, seed): part(name, name, seed, size["short"]) for name, seed in new}
    long = {(name, seed): part(name, name, seed, size["long"]) for name, seed in new}
    quickstarts = {
        (name, seed): training(
            reproduction,
            TASK.program,
            configs() / _QUICKSTART,
            {**settings, "seed": seed, "data.cache_dir": given["data.cache_dir"]},
            f"quickstart-{name}-seed{seed}",
        )
        for name, settings in size["quickstart"].items()
        for seed in range(1, reproduction.seeds + 1)
    }
    controls = {}
    for title, (name, factor) in size["controls"].items():
        rates = {rate: factor * size["runs"][name][rate] for rate in _RATES if rate in size["runs"][name]}
        controls[title] = part(name, control(name, factor), 1, size["long"], **rates)
    repeated, found, controlled, started = results(reproduction, again, long, controls, quickstarts)
    values, table = report(found, TASK.metric, size["runs"])
    short_values, short_table = report(repeated, TASK.metric, size["runs"])
    others = {title: result.final(TASK.metric) for title, result in controlled.items()}
    started_values, started_table = report(started, TASK.metric, size["quickstart"])
    table += table_of_losses(f"{size['short']} updates, seed 0", ends, TASK.metric)
    table += f"\n{size['short']} updates, new seeds\n\n{short_table}"
    table += table_of_losses(f"{size['long']} updates, seed 1", others, TASK.metric)
    table += f"\nquickstart\n\n{started_table}"
    tables = {"short": ends, "short with new seeds": short_values, "controls": others, "quickstart": started_values}
    return Outcome({**values, **tables}, table, {"curves": curves(found, TASK.metric)})


def control(name: str, factor: float) -> str:
    """Return what the run of an optimizer with so many times its learning rates is called."""
    return f"{name}-rates-{factor:g}"


_PP = {
    "optimizer.name": "stacey",
    "optimizer.variant": "pp",
    "optimizer.p": 30,
    "optimizer.alpha": 0.01,
    "optimizer.lr": 0.0005814461593583411,
    "optimizer.tau": 5.027631356600399e-05,
    "optimizer.weight_decay": 0.42525720804216705,
    "optimizer.betas": [0.9, 0.95],
    "schedule.tau": "lr",
}
_ADAMW = {
    "optimizer.name": "adamw",
    "optimizer.lr": 0.002188802248607464,
    "optimizer.weight_decay": 0.06755213191286193,
    "optimizer.betas": [0.9, 0.99],
}
_QUICKSTART_PP = {"optimizer.name": "stacey", "optimizer.variant": "pp"}
_CHOSEN = 220.0
"""exp(10) times the first alpha: z averages about the last tenth of the run."""

EXPERIMENT = Experiment(
    "alpha",
    "not in the paper: does an alpha that grows help (p,p) in long runs? LLaMA, 20 M tokens",
    {
        "cpu": Scale(
            "0.9 M parameters, 5 short runs of 3 000 updates, 3 short ones, 3 long ones of 10 000 and 3 quickstarts "
            "for each seed, and 3 long ones more; eight hours on two cores",
            3,
            {
                # What `reproduce long` has found.
                "runs": {
                    "adamw": _ADAMW,
                    "stacey_pp": _PP,
                    "stacey_pp_growing": {**_PP, "schedule.final_alpha": _CHOSEN},
                },
                # exp(3), exp(10) and exp(30) times the first
                "final_alpha": (None, 0.2, _CHOSEN, 1.07e11),
                # Whether another learning rate would be better over the whole run.
                "controls": {
                    "AdamW, half of the learning rate": ("adamw", 0.5),
                    "AdamW, twice the learning rate": ("adamw", 2.0),
                    "STACEY(p,p), twice lr and τ": ("stacey_pp", 2.0),
                },
                # With the default numbers, in which alpha of (p,p) is 0.00123.
                "quickstart": {
                    "adamw": {"optimizer.name": "adamw"},
                    "stacey_pp": _QUICKSTART_PP,
                    "stacey_pp_growing": {**_QUICKSTART_PP, "schedule.final_alpha": 27.0},
                },
                "short": 3000,
                "long": 10_000,
            },
        ),
    },
    run,
    files=(_CONFIG, _QUICKSTART),
)
