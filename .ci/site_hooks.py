"""Lets the site hold what the documentation links to outside docs/, as the source tree has it.

A link to ../SECURITY.md leads to a page; one to a source file or a directory to a page that shows the file, or all
files of the directory. So the site is complete without the address of any repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".sh": "bash", ".yaml": "yaml", ".json": "json"}
LINK = re.compile(r"\]\(([^):#]+)(#[^)]*)?\)")
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def on_config(config: MkDocsConfig) -> None:
    """Say on every page which version it describes."""
    version = re.search(r'__version__ = "(.*)"', (ROOT / "stacey_dist" / "version.py").read_text(encoding="utf-8"))
    assert version
    config.copyright = f"stacey_dist {version[1]}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the source tree's root, and a page for each file or directory that is linked to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    linked = set()
    for path in (*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in PAGES)):
        for target, _ in LINK.findall(path.read_text(encoding="utf-8")):
            place = (path.parent / target).resolve()
            outside = place.is_relative_to(ROOT) and not place.is_relative_to(ROOT / "docs")
            if outside and place.exists() and place.relative_to(ROOT).as_posix() not in PAGES:
                linked.add(place.relative_to(ROOT).as_posix())
    for name in sorted(linked):
        files.append(File.generated(config, f"source/{name}.md", content=UNSEARCHED + _show(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links where the site has what they name."""
    source = page.file.src_uri
    if source.startswith("source/"):
        return markdown
    folder = "" if source in PAGES else posixpath.join("docs", posixpath.dirname(source))

    def point(match: re.Match[str]) -> str:
        name = posixpath.normpath(posixpath.join(folder, match[1]))
        place = name.removeprefix("docs/") if name in PAGES or name.startswith("docs/") else f"source/{name}.md"
        return f"]({posixpath.relpath(place, posixpath.dirname(source) or '.')}{match[2] or ''})"

    return LINK.sub(point, markdown)


def _show(name: str) -> str:
    path = ROOT / name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    parts = [f"# {name}"]
    for file in files:
        if path.is_dir():
            parts.append(f"## {file.name}")
        parts.append(f"````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}````")
    return "\n\n".join(parts) + "\n"
