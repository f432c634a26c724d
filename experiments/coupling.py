"""What z does over a run: the coupling's share of each update, and how much z is an average of gradients, by layer."""

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.comparison import train
from experiments.framework import Advance, Experiment, Outcome, Part, Reproduction, Scale, configs
from experiments.trial import Trial, data_settings, threads_each
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import base_optimizer
from stacey_dist.training.callbacks import Callback, Training
from stacey_dist.training.reports.norms import draw_layers, layer_of, layers_in
from stacey_dist.training.reports.rows import RowFile, read_rows

Rows = list[dict[str, Any]]

EVERY = 50
"""Updates between rows of coupling.jsonl."""
HORIZON = 1000
"""Updates that the slow average of gradients has, about: it is g_slow' = (1 - 1/HORIZON) g_slow + g/HORIZON."""

KINDS = {
    "share": "the coupling's share of the update",
    "z_slow": "cosine of z and -g_slow",
    "m_slow": "cosine of m and g_slow",
    "with_rest": "cosine of the coupling and the rest of the update",
}
"""The columns of coupling.jsonl, by layer. The coupling is tau (z' - theta), the rest is theta' - theta less that."""


class Coupling(Callback):
    """Writes coupling.jsonl in a run of STACEY on one process: `KINDS`, by layer, every `EVERY` updates.

    The average of gradients is not saved: a run that is watched begins anew where it was killed.
    """

    def on_run_begin(self, training: Training) -> None:
        """Begin to watch the optimizer."""
        if training.run.accelerator.num_processes > 1:
            raise ValueError("coupling: it is for one process")
        self.rows = RowFile(training.run.directory / "coupling.jsonl", training.run.say)
        self.rows.drop_later(training.step, training.step)
        self.optimizer = base_optimizer(training.engine.optimizer)
        self.parameters = [(n, p) for n, p in training.engine.module.named_parameters() if p.requires_grad]
        self.slow = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.parameters}
        self.before: dict[str, Tensor] = {}
        self.is_due = False
        self.optimizer.register_step_pre_hook(self._look)

    def on_update_begin(self, training: Training) -> None:
        """Decide whether the update is looked at."""
        self.before.clear()
        self.is_due = (training.step + 1) % EVERY == 0

    def _look(self, optimizer: Any, *_: Any) -> None:
        """Add the gradients to their average, clipped as the optimizer takes them, unless the update is skipped."""
        skipped, divisor = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if skipped is not None and bool(skipped):
            return
        for name, parameter in self.parameters:
            if parameter.grad is None:
                continue
            gradient: Any = parameter.grad if divisor is None else parameter.grad / divisor.to(parameter.grad)
            self.slow[name].lerp_(gradient.float(), 1 / HORIZON)
            if self.is_due:
                self.before[name] = parameter.detach().clone()

    def on_update_end(self, training: Training) -> None:
        """Write the row of an update that is looked at. One that was skipped has none."""
        if not self.before:
            return
        tau = self.optimizer.param_groups[0]["tau"]
        measured: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters:
            if name not in self.before:
                continue
            state, before = self.optimizer.state[parameter], self.before[name]
            z, m, slow = state["z"].float(), state["m"].float(), self.slow[name]
            coupling = tau * (z - before)
            rest = parameter.detach() - before - coupling
            sums = measured.setdefault(layer_of(name), {})
            for pair, (a, b) in dict(update=(coupling, rest), z=(z, -slow), m=(m, slow)).items():
                products = torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()]).double()
                sums[pair] = sums.get(pair, 0.0) + products
        row: dict[str, Any] = {"step": training.step}
        for layer, sums in measured.items():
            update, z_slow, m_slow = (sums[pair].tolist() for pair in ("update", "z", "m"))
            figures = _share(*update), _cosine(*z_slow), _cosine(*m_slow), _cosine(*update)
            row |= {f"{kind}/{layer}": figure for kind, figure in zip(KINDS, figures, strict=True)}
        self.rows.append(row)

    def on_run_end(self, training: Training) -> None:
        """Write the rows that wait."""
        self.rows.flush()


def _share(aa: float, bb: float, _: float) -> float:
    """Return |a| / (|a| + |b|) of vectors whose products these are: a a, b b, a b."""
    a, b = math.sqrt(aa), math.sqrt(bb)
    return a / (a + b) if a + b else 0.0


def _cosine(aa: float, bb: float, ab: float) -> float:
    lengths = math.sqrt(aa) * math.sqrt(bb)
    return ab / lengths if lengths else 0.0


def run(reproduction: Reproduction) -> Outcome:
    """Train each variant with each seed, watched."""
    size = reproduction.scale.settings
    given = data_settings("train_llm.py", reproduction.directory, reproduction.data, {})
    parts = {
        (name, seed): _part(reproduction, f"{name}-seed{seed}", {**own, **size["all"], **given, "seed": seed})
        for name, own in size["runs"].items()
        for seed in range(1, reproduction.seeds + 1)
    }
    (values,) = reproduction.compute(parts)
    found: dict[str, list[Rows]] = {}
    for (name, _), rows in values.items():
        found.setdefault(name, []).append(rows)
    first = {name: runs[0] for name, runs in found.items()}
    return Outcome({"rows": found}, _table(found), {"coupling": _figure(first)})


def _part(reproduction: Reproduction, name: str, settings: dict[str, Any]) -> Part:
    """Return a watched run as a part; its value is the rows of coupling.jsonl."""
    directory = reproduction.directory / "runs" / name
    config = configs() / "sweeps/long/base.yaml"
    threads = threads_each(reproduction.workers)
    trial = Trial("train_llm.py", config, settings, directory, threads, watch="experiments.coupling:Coupling")

    def compute(advance: Advance) -> Rows:
        if train(reproduction, trial, advance)["diverged"]:
            raise SettingsError(f"{directory}: the run diverged; give it other settings")
        return read_rows(directory / "coupling.jsonl")

    return Part(name, compute)


def means(found: dict[str, list[Rows]]) -> Iterator[tuple[str, int, list[float]]]:
    """Yield each run's name, an update and the means of `KINDS` over layers and seeds, at four moments of the run."""
    for name, runs in found.items():
        for quarter in (1, 2, 3, 4):
            rows = [run[quarter * len(run) // 4 - 1] for run in runs]
            yield name, rows[0]["step"], [statistics.mean(_mean(row, kind) for row in rows) for kind in KINDS]


def _mean(row: dict[str, Any], kind: str) -> float:
    """Return the mean of a column of coupling.jsonl over the layers."""
    return statistics.mean(value for name, value in row.items() if name.startswith(f"{kind}/"))


def _table(found: dict[str, list[Rows]]) -> str:
    """Return the means over layers and seeds, at four moments of each run."""

    def lines() -> Iterator[str]:
        yield "| run | update | " + " | ".join(KINDS.values()) + " |"
        yield "|---|---|" + "---|" * len(KINDS)
        for name, step, figures in means(found):
            yield f"| {name} | {step} | " + " | ".join(f"{mean:.3f}" for mean in figures) + " |"

    return "\n".join(lines())


def _figure(found: dict[str, Rows]) -> Figure:
    """Draw a panel for each kind and run, with a line for each layer."""
    figure = Figure(figsize=(4.5 * len(found), 2.4 * len(KINDS)), layout="constrained")
    panels = figure.subplots(len(KINDS), len(found), sharex="col", sharey="row", squeeze=False)
    for column, (name, rows) in enumerate(found.items()):
        layers = layers_in(rows)
        for line, (kind, title) in enumerate(KINDS.items()):
            axes = panels[line][column]
            draw_layers(axes, {x: [(row["step"], row[f"{kind}/{x}"]) for row in rows] for x in layers})
            axes.set_title(f"{name}: {title}", fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("update")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize="small")
    return figure


_PP = {"optimizer.variant": "pp", "optimizer.p": 30, "optimizer.alpha": 0.01, "optimizer.tau": 3.0e-5}
_P2 = {"optimizer.variant": "p2", "optimizer.p": 1000, "optimizer.alpha": 1.0, "optimizer.tau": 0.002}

EXPERIMENT = Experiment(
    "coupling",
    "not in the paper: what z does over a run of the small LLaMA, by layer",
    {
        "cpu": Scale(
            "0.9 M parameters, 3 000 updates of (p,p) and (p,2); an hour on two cores",
            2,
            {
                "runs": {
                    "stacey_pp": {**_PP, "schedule.tau": "constant"},
                    "stacey_pp_tau_with_lr": {**_PP, "schedule.tau": "lr"},
                    "stacey_p2": {**_P2, "schedule.tau": "lr"},
                },
                "all": {
                    "optimizer.name": "stacey",
                    "optimizer.lr": 7.0e-4,
                    "optimizer.weight_decay": 0.3,
                    "optimizer.betas": [0.8, 0.9],
                    "train.max_steps": 3000,
                    "train.eval_every_steps": 1000,
                },
            },
        ),
    },
    run,
    files=("sweeps/long/base.yaml",),
)
