"""The measured figures of the documentation: the pages draw tables from docs/figures.json and docs/results.

A page says where a table belongs:

    <!-- figures: NAME -->
    ...
    <!-- end -->
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

from experiments.alpha import EXPERIMENT, control
from experiments.comparison_report import LOOKS, report
from experiments.coupling import KINDS, means
from experiments.trial import Result

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LONG_RUNS, ALPHA = (ROOT / "docs/results" / name / "parts" for name in ("long-runs", "alpha"))
SEEDS = (1, 2, 3)
"""Of runs with new seeds."""
MARKED = re.compile(r"^<!-- figures: (\S+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


@functools.cache
def tables() -> dict[str, list[list[str]]]:
    """Return the rows of each table, the header first. A table may be some columns of another."""
    read: dict[str, Any] = json.loads((ROOT / "docs" / "figures.json").read_text(encoding="utf-8"))
    whole = {name: table for name, table in read.items() if isinstance(table, list)}
    parts = {name: table for name, table in read.items() if name not in whole}
    columns = {name: [[row[i] for i in part["columns"]] for row in whole[part["of"]]] for name, part in parts.items()}
    drawn = {
        "long-runs": long_runs(),
        "alpha": alpha(),
        "alpha-again": alpha_again(),
        "alpha-quickstart": alpha_quickstart(),
        "alpha-long": alpha_long(),
        "alpha-summary": alpha_summary(),
        "coupling": coupling(),
    }
    return whole | columns | drawn


def long_runs() -> list[list[str]]:
    """Return the held-out losses of the experiment's long runs that were made."""
    choices = {"-as-found": ", as found", "-halved": ", halved", "": "", "-wd0.4": ", λ 0.4", "-wsd": ", wsd"}
    labels = {f"{name}{choice}": look.label + how for name, look in LOOKS.items() for choice, how in choices.items()}
    return _losses(LONG_RUNS, labels)


def alpha() -> list[list[str]]:
    """Return the held-out losses of the short runs of the experiment on alpha."""
    growths = {"": "constant", "-to-0.2": "grows by e³", "-to-220": "grows by e¹⁰", "-to-1.07e+11": "grows by e³⁰"}
    files = {"AdamW": "adamw", **{f"STACEY(p,p), α {how}": f"stacey_pp-alpha{end}" for end, how in growths.items()}}
    ends = {label: _result(ALPHA / f"{name}-3000-seed0.json").final("eval_loss") for label, name in files.items()}
    return [["run", "held-out loss"], *([label, f"{end:.4f}"] for label, end in ends.items())]


def alpha_long() -> list[list[str]]:
    """Return the held-out losses of the long runs of the experiment on alpha that were made."""
    labels = {name: look.label for name, look in LOOKS.items()}
    labels |= {control(*of): title for title, of in EXPERIMENT.scales["cpu"].settings["controls"].items()}
    return _losses(ALPHA, {f"{name}-10000": label for name, label in labels.items()})


def alpha_summary() -> list[list[str]]:
    """Return the means over new seeds of the long runs, and of their differences from AdamW."""
    rows = [["run", "held-out loss", "against AdamW", "bytes of state"]]
    runs = {name: ALPHA / f"{name}-10000" for name in ("adamw", "stacey_pp", "stacey_pp_growing")}
    runs["stacey_uncoupled"] = LONG_RUNS / "stacey_uncoupled"
    found = {(name, seed): _result(Path(f"{run}-seed{seed}.json")) for name, run in runs.items() for seed in SEEDS}
    values, _ = report(found, "eval_loss", {name: {} for name in runs})
    for name, of in values["optimizers"].items():
        against = "–" if name == "adamw" else f"{of['difference']:+.4f} ± {of['interval_of_difference']:.4f}"
        loss = f"{of['mean']:.4f} ± {of['interval']:.4f}"
        rows.append([LOOKS[name].label, loss, against, f"{of['state_bytes_per_parameter']:.0f}"])
    return rows


def alpha_again() -> list[list[str]]:
    """Return the held-out losses of short runs with each seed, and what the growth of alpha changes."""
    files = {
        "AdamW": ("adamw", "adamw"),
        "STACEY(p,p), α constant": ("stacey_pp-alpha", "stacey_pp"),
        "STACEY(p,p), α grows": ("stacey_pp-alpha-to-220", "stacey_pp_growing"),
    }
    columns = ["seed 0, which chose the growth", *(f"seed {seed}" for seed in SEEDS)]
    names = {
        title: [f"{chosen}-3000-seed0", *(f"{name}-3000-seed{seed}" for seed in SEEDS)]
        for title, (chosen, name) in files.items()
    }
    return _with_change(columns, names)


def alpha_quickstart() -> list[list[str]]:
    """Return what the growth of alpha changes in the quickstart with (p,p) and its default numbers."""
    names = {
        name: [f"quickstart-{name}-seed{n}" for n in SEEDS] for name in ("adamw", "stacey_pp", "stacey_pp_growing")
    }
    return _with_change([f"seed {n}" for n in SEEDS], {LOOKS[name].label: of for name, of in names.items()})


def _with_change(columns: list[str], names: dict[str, list[str]]) -> list[list[str]]:
    """Return held-out losses of AdamW, of a constant and of a growing alpha, and the last less each of the others."""
    ends = {title: [_result(ALPHA / f"{n}.json").final("eval_loss") for n in of] for title, of in names.items()}
    rows = [[title, *(f"{end:.4f}" for end in losses)] for title, losses in ends.items()]
    adamw, constant, growing = ends.values()
    for title, others in (("what the growth changes", constant), ("against AdamW", adamw)):
        rows.append([title, *(f"{own - other:+.4f}" for own, other in zip(growing, others, strict=True))])
    return [["run", *columns], *rows]


def coupling() -> list[list[str]]:
    """Return what z does, as the experiment's table has it."""
    runs = {
        "stacey_pp": "STACEY(p,p), τ constant",
        "stacey_pp_tau_with_lr": "STACEY(p,p), τ with lr",
        "stacey_p2": "STACEY(p,2), τ with lr",
    }
    read = json.loads((ROOT / "docs/results/coupling.json").read_text())
    found = {label: [read[f"{name}-seed{seed}"] for seed in (1, 2)] for name, label in runs.items()}
    table = [["run", "update", *KINDS.values()]]
    for label, step, figures in means(found):
        table.append([label, f"{step:,}".replace(",", " "), *(f"{mean:.2f}" for mean in figures)])
    return table


def _losses(directory: Path, labels: dict[str, str]) -> list[list[str]]:
    """Return the held-out losses on the way of all runs of these names, whatever their seeds."""
    updates = (2000, 4000, 6000, 8000, 10000)
    rows = [["run", *(f"{step:,}".replace(",", " ") for step in updates)]]
    for name, label in labels.items():
        for file in sorted(directory.glob(f"{name}-seed*.json")):
            losses = {row["step"]: row["eval_loss"] for row in _result(file).evaluations}
            seed = file.stem.rpartition("seed")[2]
            rows.append([f"{label}, seed {seed}", *(f"{losses[step]:.4f}" for step in updates)])
    return rows


def _result(file: Path) -> Result:
    return Result(**json.loads(file.read_text()))


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    header, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def drawn(page: str) -> str:
    """Return a page with its tables as they are to be."""
    known = tables()
    return MARKED.sub(lambda m: f"<!-- figures: {m[1]} -->\n\n{markdown(known[m[1]])}\n\n<!-- end -->", page)
