"""The measured figures of the documentation: the pages draw tables from docs/figures.json and docs/results.

A page says where a table belongs:

    <!-- figures: NAME -->
    ...
    <!-- end -->
"""

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_UPDATES = (2000, 4000, 6000, 8000, 10000)
MARKED = re.compile(r"^<!-- figures: (\S+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


@functools.cache
def tables() -> dict[str, list[list[str]]]:
    """Return the rows of each table, the header first. A table may be some columns of another."""
    read: dict[str, Any] = json.loads((ROOT / "docs" / "figures.json").read_text(encoding="utf-8"))
    whole = {name: table for name, table in read.items() if isinstance(table, list)}
    parts = {name: table for name, table in read.items() if name not in whole}
    columns = {name: [[row[i] for i in part["columns"]] for row in whole[part["of"]]] for name, part in parts.items()}
    drawn = {"long-runs": long_runs(), "alpha": alpha(), "alpha-long": alpha_long(), "alpha-summary": alpha_summary()}
    return whole | columns | drawn


def alpha() -> list[list[str]]:
    """Return the held-out losses of the short runs of the experiment on alpha."""
    rows = [["run", "held-out loss"]]
    directory, finals = ROOT / "docs/results/alpha/parts", {"": "constant", "-to-0.2": "grows by e³"}
    finals |= {"-to-220": "grows by e¹⁰", "-to-1.07e+11": "grows by e³⁰"}
    files = {"AdamW": "adamw", **{f"STACEY(p,p), α {how}": f"stacey_pp-alpha{final}" for final, how in finals.items()}}
    for label, name in files.items():
        (loss,) = _losses(directory / f"{name}-3000-seed0.json", (3000,))
        rows.append([label, loss])
    return rows


def alpha_summary() -> list[list[str]]:
    """Return the mean over the seeds of the long runs of the experiment on alpha, and of the differences from AdamW."""
    labels = _labels()
    from experiments.comparison_report import report

    rows = [["run", "held-out loss", "against AdamW", "bytes of state"]]
    names, parts = ("adamw", "stacey_pp", "stacey_pp_growing"), ROOT / "docs/results/alpha/parts"
    runs = {(name, seed): parts / f"{name}-10000-seed{seed}.json" for name in names for seed in (1, 2, 3)}
    found = {key: json.loads(file.read_text()) for key, file in runs.items()}
    for name, of in report(found, "eval_loss", {name: {} for name in names}, {}, {}).values["optimizers"].items():
        against = "–" if name == "adamw" else f"{of['difference']:+.4f} ± {of['interval_of_difference']:.4f}"
        loss = f"{of['mean']:.4f} ± {of['interval']:.4f}"
        rows.append([labels[name], loss, against, f"{of['state_bytes_per_parameter']:.0f}"])
    return rows


def alpha_long() -> list[list[str]]:
    """Return the held-out losses of the long runs of the experiment on alpha that were made."""
    rows = [["run", *map(_spaced, _UPDATES)]]
    labels = _labels()
    from experiments.alpha import EXPERIMENT, control

    controls = {control(*of): title for title, of in EXPERIMENT.scales["cpu"].settings["controls"].items()}
    for name, label in (labels | controls).items():
        for file in sorted((ROOT / "docs/results/alpha/parts").glob(f"{name}-10000-seed*.json")):
            rows.append([f"{label}, seed {file.stem.rsplit('seed', 1)[1]}", *_losses(file, _UPDATES)])
    return rows


def long_runs() -> list[list[str]]:
    """Return the held-out losses of the long runs that were made, from the files that the experiment has left."""
    rows = [["run", *map(_spaced, _UPDATES)]]
    for name, label in _labels().items():
        for file in sorted((ROOT / "docs/results/long-runs/parts").glob(f"{name}-*seed*.json")):
            *choice, seed = file.stem.removeprefix(f"{name}-").rsplit("-", 1)
            how = {"as-found": ", as found", "halved": ", halved", "wsd": ", wsd"}[choice[0]] if choice else ""
            rows.append([f"{label}{how}, seed {seed.removeprefix('seed')}", *_losses(file, _UPDATES)])
    return rows


def _labels() -> dict[str, str]:
    sys.path.insert(0, str(ROOT))  # `experiments` is not installed
    from experiments.comparison_report import LABELS

    return LABELS


def _losses(file: Path, updates: tuple[int, ...]) -> list[str]:
    losses = {row["step"]: row["eval_loss"] for row in json.loads(file.read_text())["evaluations"]}
    return [f"{losses[step]:.4f}" for step in updates]


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    header, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows)
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def drawn(page: str) -> str:
    """Return a page with its tables as they are to be."""
    known = tables()
    return MARKED.sub(lambda m: f"<!-- figures: {m[1]} -->\n\n{markdown(known[m[1]])}\n\n<!-- end -->", page)
