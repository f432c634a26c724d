"""The pages are current and short enough, and their links and figures are right."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

from stacey_dist import Stacey

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
DRAWN = re.compile(r"^<!-- figures: \S+ -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
WIDEST = 84  # columns of code, beside both sidebars of the site


@pytest.fixture(scope="module")
def stale():
    """The files that `.ci/pages.py` would change, made in a process of its own, where they do not stay imported."""
    program = "import pages; [print(path) for path, text in pages.pages().items() if path.read_text() != text]"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / ".ci", capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout.split()


def test_what_is_drawn_and_made_is_current(stale):
    assert stale == [], "run `python .ci/pages.py`"


def prose(text):
    """A page without code, tables, comments and the targets of links."""
    text = re.sub(r"<!--.*?-->", "", CODE.sub("", text), flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"^\|.*$", "", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page):
    """A row without a header and columns of another number are shown as text, with their bars."""
    text = CODE.sub("", page.read_text())
    for table in re.findall(r"(?:^ *\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row.strip()).strip("|")) for row in table.splitlines()]
        assert len(rows) > 2, table
        assert all(set(cell) <= set("-: ") for cell in rows[1]), table
        assert {len(row) for row in rows} == {len(rows[0])}, table


def test_the_readme_is_short():
    assert len(prose(README).split()) <= 700


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/results/index.md"])
def test_measured_figures_are_drawn_from_one_file(name):
    rest = CODE.sub("", DRAWN.sub("", (ROOT / name).read_text()))
    assert not re.findall(r"\b\d+\.\d{3,}\b|\b\d\d\.\d %", rest)


def test_the_figures_at_a_glance_are_those_of_the_runs():
    tables = json.loads((ROOT / "docs" / "figures.json").read_text())

    def value(table, row, column):
        return float(re.search(r"\d+\.\d+", next(r for r in tables[table] if r[0].startswith(row))[column])[0])

    shown = [
        [float(re.search(r"\d[\d.]*", re.sub(r"\(.*?\)|p = \d+", "", cell))[0]) for cell in row[1:3]]
        for row in tables["glance"][1:]
    ]
    quickstart = [
        [value("the-quickstart", row, column) for column in (4, 5)] for row in ("**the defaults**", "**AdamW**")
    ]
    assert shown[0] == pytest.approx([mean(losses) for losses in quickstart], abs=6e-4)
    small, longer = "llama-small", "shorter-still-2"
    assert shown[1] == pytest.approx([value(small, "STACEY(p,p)", 1), value(small, "AdamW", 1)], abs=6e-4)
    assert shown[2] == pytest.approx([value(longer, "(p,p)", 6), value(longer, "AdamW", 6)], abs=6e-4)
    for row, name, updates in (
        (3, "stacey_pp_growing", 3000),
        (4, "stacey_pp", 10_000),
        (5, "stacey_pp_growing", 10_000),
    ):
        ends = [
            mean(
                json.loads(file.read_text())["evaluations"][-1]["eval_loss"]
                for file in (ROOT / "docs/results/alpha/parts").glob(f"{each}-{updates}-seed[123].json")
            )
            for each in (name, "adamw")
        ]
        assert shown[row] == pytest.approx(ends, abs=6e-4)
    images = "cifar-eight-seeds"
    assert shown[6] == pytest.approx([value(images, "STACEY", 1), value(images, "AdamW", 1)], abs=0.06)
    costs = [("p2, p = 2.8", 2), ("p2, p = 2.8", 4), ("pp, p = 30", 4)]
    assert shown[7:10] == [[value("cost-of-a-step", f"`Stacey` {name}", column), 1] for name, column in costs]


def test_the_readmes_deepspeed_settings_are_settings_of_the_class():
    block = re.search(r"```json\n(.*?)```", README, re.DOTALL)[1]
    section = json.loads(f"{{{block}}}")["optimizer"]
    assert section["type"] == "Stacey"
    Stacey([torch.zeros(2, requires_grad=True)], **section["params"])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_fits_and_links_lead_somewhere(path):
    text = path.read_text()
    output = path.name == "plan.md"  # shows what the program prints, in a page without the right sidebar
    text = re.sub(r"^<!-- from: \S+ -->$\n```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)  # quotes wrap
    wide = [line for block in CODE.findall(text) for line in block.splitlines() if len(line) > WIDEST]
    assert output or not wide
    for target in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", CODE.sub("", text)):
        assert (path.parent / target).exists(), target
