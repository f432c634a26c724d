"""`stacey-dist report`: what the page says of the runs, and that a browser shows it without another host."""

import json
import math
import shutil

import pytest
import yaml

from stacey_dist.cli import main
from stacey_dist.training.reports.loss_plot import smoothed
from stacey_dist.training.reports.report import Record
from tests.browser import tab  # noqa: F401

UPDATES = 20


def write_run(directory, lr, loss, **more):
    """A run of 100 tokens an update at 50 tokens/s, with its held-out loss after every tenth update."""
    directory.mkdir()
    settings = {
        "run_dir": str(directory),
        "optimizer": {"lr": lr, "name": "a <b> & c"},
        "data": {"files": ["x"], **more},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, UPDATES + 1):
            row = {"step": step, "tokens": 100 * step, "loss": loss + 1 / step, "lr": lr, "grad_norm": 0.5}
            file.write(json.dumps(row | {"tokens_per_second": 50.0, "skipped_steps": step // 15}) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "eval_loss": loss + 0.01 * step, "eval_perplexity": 2.0}) + "\n")


@pytest.fixture
def runs(tmp_path):
    for name, lr, loss, more in (("first", 0.1, 3.0, {}), ("<second>", 0.2, 2.5, {"max_tokens": 7})):
        write_run(tmp_path / name, lr, loss, **more)
    return [str(tmp_path / "first"), str(tmp_path / "<second>")]


def cells(page, name):
    """Return the cells of the line of a table that begins with `name`."""
    (line,) = [line for line in page.splitlines() if f"{name}</td>" in line]
    return [part.rpartition(">")[2] for part in line.split("</td>")[:-1]]


def test_a_report_has_results_and_settings_that_differ(runs, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", *runs, "--output", str(output)]) == 0
    assert f"report of 2 runs: {output}" in capsys.readouterr().out
    page = output.read_text()
    assert cells(page, " first")[1:3] == ["20", "2,000 tokens"]
    assert cells(page, " first")[4:] == ["3.2000", "2.0000", "3.1000 after 10", "50 tokens/s", "40s", "1"]
    assert cells(page, " &lt;second&gt;")[4] == "2.7000"
    assert cells(page, "optimizer.lr")[1:] == ["0.1", "0.2"]
    assert cells(page, "data.max_tokens")[1:] == ["not there", "7"]
    assert "optimizer.name" not in page
    assert "run_dir" not in page
    assert "<second>" not in page
    assert page.count("<svg") == 3
    assert main(["report", runs[0], "--output", str(output)]) == 0  # in the place of an older report
    assert "<p>None.</p>" in output.read_text()


def test_a_number_of_others_is_no_html(runs, tmp_path):
    with open(f"{runs[0]}/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 10**6, "loss": 1.0, "skipped_steps": "<img src=x>", "lr": "<b>"}) + "\n")
    page = tmp_path / "page.html"
    assert main(["report", runs[0], "--output", str(page)]) == 0
    assert "<img" not in page.read_text()
    assert "<b>" not in page.read_text()


def test_what_is_no_run_and_what_is_no_report_are_refused(runs, tmp_path, capsys):
    assert main(["report", runs[0], str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} is no run's directory: it has no metrics.jsonl with rows" in capsys.readouterr().err
    shutil.copytree(runs[0], tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text("- 1")
    assert main(["report", str(tmp_path / "a")]) == 2
    assert f"{tmp_path / 'a' / 'config.yaml'}: it must hold settings, not list" in capsys.readouterr().err
    (tmp_path / "notes.html").write_text("<p>mine")
    assert main(["report", runs[0], "--output", str(tmp_path / "notes.html")]) == 2
    assert "is there and no report; give another file" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "<p>mine"


def test_a_smoothed_curve_is_a_weighted_mean_of_the_values_so_far():
    points = [(step, math.sin(step)) for step in range(1, 201)]
    decay = 1 - 50 / 200
    for number, (step, value) in enumerate(smoothed(points)):
        weights = [decay ** (number - i) for i in range(number + 1)]
        mean = sum(w * y for w, (_, y) in zip(weights, points, strict=False)) / sum(weights)
        assert (step, value) == (points[number][0], pytest.approx(mean))
    assert smoothed(points[:40]) == points[:40]


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [1366, 390])
def test_a_browser_shows_it(runs, tmp_path, tab, width):  # noqa: F811
    page, wrong = tab
    output = tmp_path / "page.html"
    assert main(["report", *runs, "--output", str(output)]) == 0
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(output.as_uri())
    for number in range(3):
        page.locator(f"#x{number}").check()
        shown = [i for i in range(3) if page.locator(f".x{i}").is_visible()]
        assert shown == [number]
        box = page.locator(f".x{number} svg").bounding_box()
        assert box["width"] > 0.8 * min(width, 1000)
        assert box["height"] > 100
    assert not page.evaluate("() => document.scrollingElement.scrollWidth > innerWidth")
    assert not wrong


def test_the_hours_of_a_run_that_resumed():
    """The first update after a resume is slow, and the updates before it are in no row."""
    rows = [
        {"step": 1, "tokens": 10, "tokens_per_second": 1.0, "seconds": 10.0, "lr": 0.1},
        {"step": 100, "tokens": 1000, "tokens_per_second": 100.0, "seconds": 9.9, "lr": 0.1},
        # killed after update 190, of which a checkpoint was saved
        {"step": 191, "tokens": 1910, "tokens_per_second": 0.5, "seconds": 20.0, "lr": 0.1},
        {"step": 200, "tokens": 2000, "tokens_per_second": 90.0, "seconds": 1.0, "lr": 0.1},
    ]
    (*_, (name, steps, hours)) = Record("a", {}, rows).places()
    assert name == "hours of training"
    assert steps == [0, 1, 100, 191, 200]
    assert [round(3600 * hour, 6) for hour in hours] == [0.0, 10.0, 19.9, 19.9 + 20.0 + 9.0, 49.9]
    for row in rows:  # of a version that did not write them
        del row["seconds"]
    (*_, (_, _, hours)) = Record("a", {}, rows[:2]).places()
    assert [round(3600 * hour, 6) for hour in hours] == [0.0, 10.0, 19.9]
