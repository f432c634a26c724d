"""The documentation site in a browser, from disk, as wide as a laptop and as a telephone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import tab  # noqa: F401

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).parents[1]
WIDTHS = (1366, 390)
# What is wider than its place. A table may be: the element around it scrolls.
CUT_OFF = """() => [...document.querySelectorAll("pre, pre > code, .arithmatex, .md-content img")]
    .filter(each => each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX != "auto"
            || each.matches("pre, code") && each.scrollWidth > each.clientWidth + 1 && each.clientWidth > 0)
    .map(each => each.textContent.slice(0, 80))"""
OVERFLOW = "() => document.scrollingElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built."""
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    return directory


@pytest.fixture
def page(tab):  # noqa: F811
    tab[1].clear()
    return tab


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_and_nothing_fails(site, page, width):
    page, wrong = page
    page.set_viewport_size({"width": width, "height": 800})
    pages = [path for path in sorted(site.rglob("*.html")) if "source" not in path.parts and path.name != "404.html"]
    assert len(pages) > 20
    found = {}
    for path in pages:
        page.goto(path.as_uri())
        name = str(path.relative_to(site))
        found[name] = [*page.evaluate(CUT_OFF), *(["the page"] if page.evaluate(OVERFLOW) else []), *wrong]
        wrong.clear()
    assert not {name: parts for name, parts in found.items() if parts}


def test_formulas_are_typeset(site, page):
    page, wrong = page
    page.goto((site / "explanation" / "algorithm.html").as_uri())
    assert page.locator(".arithmatex").count() == page.locator(".arithmatex .katex").count() > 20
    assert page.locator(".katex-error").count() == len(wrong) == 0


def test_the_search_works_from_disk_and_leaves_source_pages_out(site, page):
    page, wrong = page
    page.set_viewport_size({"width": 1366, "height": 800})
    page.goto((site / "index.html").as_uri())
    page.locator("input.md-search__input").click()
    page.keyboard.type("interpolate")
    page.wait_for_selector(".md-search-result__link")
    links = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
    assert any("explanation/algorithm" in link for link in links)
    assert not any("/source/" in link for link in links)
    assert not wrong
