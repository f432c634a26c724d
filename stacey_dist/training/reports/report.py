"""`stacey-dist report`: runs side by side on one HTML page, which loads no other files."""

import io
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError
from stacey_dist.files import replace_file
from stacey_dist.training.reports.loss_plot import column, smoothed
from stacey_dist.training.reports.metrics import duration
from stacey_dist.training.reports.rows import read_rows
from stacey_dist.training.settings.command_line import flatten

_BEGINNING = "<!doctype html><!-- stacey-dist report -->"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#a6761d")
_POINTS = 600  # of a curve: more cannot be told apart
_OWN = ("run_dir", "tracking.run_name")  # differ in any case
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1250px; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 0.5rem 0 }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } svg { width: 100%; height: auto }
.curves > div { display: none } label { margin-right: 1.2rem }
#x0:checked ~ .curves .x0, #x1:checked ~ .curves .x1, #x2:checked ~ .curves .x2 { display: block }
"""


@dataclass(frozen=True)
class Record:
    """A run: its name on the page, its settings by their full names, its rows."""

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows of updates."""
        return [row for row in self.rows if "lr" in row]

    @property
    def unit(self) -> str:
        """The unit of the run's data, as in "tokens"."""
        names = (name for row in self.training for name in row if name.endswith("_per_second"))
        return next(names, "units_per_second").removesuffix("_per_second")

    def places(self) -> list[tuple[str, list[float], list[float]]]:
        """Return for each axis its name, and updates with where they are on it; both are empty if it is not known."""
        steps, units, hours = [0.0], [0.0], [0.0]
        before = None
        for row in self.training:
            if (speed := row.get(f"{self.unit}_per_second")) and self.unit in row:
                trained = row[self.unit] - units[-1]
                seconds = row.get("seconds", trained / speed)
                # After a resume, no row has the updates just before it: they had the speed of the row before.
                seconds += max(0.0, trained - speed * seconds) / (before or speed)
                steps.append(row["step"])
                hours.append(hours[-1] + seconds / 3600)
                units.append(row[self.unit])
                before = speed
        known = steps if len(steps) > 1 else []
        every = [0.0, float(self.rows[-1]["step"])]
        return [("updates", every, every), (self.unit, known, units), ("hours of training", known, hours)]


def report(runs: Sequence[Path], output: Path) -> int:
    """Write a page that compares runs by their directories: results, settings that differ, curves; returns 0.

    Raises SettingsError if a directory is no run's, or `output` is a file that is no older report.
    """
    if output.exists() and not output.read_bytes().startswith(_BEGINNING.encode()):
        raise SettingsError(f"--output: {output} is there and no report; give another file")
    records = [_read(run, runs) for run in runs]
    replace_file(output, page(records).encode())
    print(f"report of {len(records)} run{'s' if len(records) > 1 else ''}: {output}")
    return 0


def _read(run: Path, runs: Sequence[Path]) -> Record:
    rows = read_rows(run / "metrics.jsonl")
    if not rows:
        raise SettingsError(f"{run} is no run's directory: it has no metrics.jsonl with rows")
    config = run / "config.yaml"
    settings = (yaml_files.read(config, str(config)) if config.exists() else None) or {}
    if not isinstance(settings, dict):
        raise SettingsError(f"{config}: it must hold settings, not {type(settings).__name__}")
    alone = [other.resolve().name for other in runs].count(run.resolve().name) == 1
    return Record(run.resolve().name if alone else str(run), flatten(settings), rows)


def page(records: Sequence[Record]) -> str:
    """Return the page."""
    curves, names = [], [name for name, _, _ in records[0].places()]
    for number, name in enumerate(names):
        curves.append(f'<div class="x{number}">{_figure(records, number, name)}</div>')
    choices = "".join(
        f'<input type="radio" name="x" id="x{number}"{" checked" if number == 0 else ""}>'
        f'<label for="x{number}">{escape(name)}</label>'
        for number, name in enumerate(names)
    )
    title = f"{len(records)} runs" if len(records) > 1 else records[0].name
    differing = _differing(records)
    return (
        f'{_BEGINNING}\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n<h2>Results</h2>\n{_results(records)}\n"
        f"<h2>Settings that differ</h2>\n{differing or '<p>None.</p>'}\n"
        f'<h2>Curves</h2>\nOver {choices}\n<div class="curves">{"".join(curves)}</div>\n</body></html>\n'
    )


def _results(records: Sequence[Record]) -> str:
    figures = list(dict.fromkeys(name for record in records for row in record.rows for name in row if "eval_" in name))
    head = ["run", "updates", "trained on", "training loss", *figures, "best eval_loss", "speed", "time", "skipped"]
    return _table(head, [_result(record, color, figures) for record, color in zip(records, itertools.cycle(_COLORS))])


def _result(record: Record, color: str, figures: Sequence[str]) -> list[str]:
    """Return a run's row of the table of results, in HTML."""
    losses, held_out = smoothed(column(record.rows, "loss")), column(record.rows, "eval_loss")
    best = min(held_out, key=lambda point: point[1], default=None)
    last = [column(record.rows, name)[-1:] for name in figures]
    speeds = [speed for _, speed in column(record.rows, f"{record.unit}_per_second")]
    _, (unit, known, units), (_, _, hours) = record.places()
    return [
        f'<span style="color:{color}">&#9632;</span> {escape(record.name)}',
        f"{record.rows[-1]['step']:,}",
        f"{units[-1]:,.0f} {escape(unit)}" if known else "",
        f"{losses[-1][1]:.4f}" if losses else "",
        *("".join(f"{value:.4f}" for _, value in points) for points in last),
        f"{best[1]:.4f} after {best[0]:,}" if best else "",
        f"{statistics.median(speeds):,.0f} {escape(unit)}/s" if speeds else "",
        duration(3600 * hours[-1]) if known else "",
        f"{max((count for _, count in column(record.rows, 'skipped_steps')), default=0):,}",
    ]


def _differing(records: Sequence[Record]) -> str:
    """Return the table of the settings that are not the same in all runs; empty where there are none."""
    names = dict.fromkeys(name for record in records for name in record.settings if name not in _OWN)
    lines = []
    for name in names:
        values = ["not there" if name not in r.settings else str(r.settings[name]) for r in records]
        if len(set(values)) > 1:
            lines.append([escape(name), *map(escape, values)])
    return _table(["setting", *(record.name for record in records)], lines) if lines else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table; the head is text, the lines are HTML."""
    rows = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    rows += ["".join(f"<td>{cell}</td>" for cell in line) for line in lines]
    return '<div class="wide"><table>' + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</table></div>"


def _figure(records: Sequence[Record], axis: int, name: str) -> str:
    """Return the curves of the runs over one of their axes, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [("loss", "training loss, smoothed"), ("eval_loss", "held-out loss")]
    panels += [("eval_top1", "held-out top-1 accuracy")] * any("eval_top1" in row for r in records for row in r.rows)
    panels += [("lr", "learning rate"), ("grad_norm", "gradient norm, smoothed")]
    # Text stays text; the names inside the picture are others than those in the pictures beside it.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(10, 3 * -(-len(panels) // 2)), layout="constrained")
        for place, (key, title) in enumerate(panels, start=1):
            axes = figure.add_subplot(-(-len(panels) // 2), 2, place)
            for record, color in zip(records, itertools.cycle(_COLORS)):
                _, steps, places = record.places()[axis]
                points = column(record.rows, key)
                if not steps or not points:
                    continue
                points = smoothed(points) if key in ("loss", "grad_norm") else points
                points = points[:: -(-len(points) // _POINTS)] + points[-1:]
                x = np.interp([step for step, _ in points], steps, places)
                marker = "o" if key.startswith("eval_") else None
                axes.plot(x, [y for _, y in points], color=color, linewidth=1.3, marker=marker, markersize=3)
            axes.set(title=title, xlabel=name, yscale="log" if key == "grad_norm" else "linear")
            axes.grid(alpha=0.3)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]
