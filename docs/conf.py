"""The documentation as a site: `sphinx-build -W -c docs . build/docs`.

The source folder is the whole repository, so that a link between two pages is the same one here and on GitHub.
"""

import re
from os.path import normpath
from pathlib import Path

from sphinx.application import Sphinx

import fastcr

ROOT = Path(__file__).parents[1]
START = "docs/index"

project, author, version = "fastcr", "The fastcr authors", fastcr.__version__
copyright = f"{author}, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = START
include_patterns = [
    "*.md",
    "docs/*.md",
    "bench/README.md",
    "bench/results/*.md",
    "kernels/README.md",
    "tests/ptx/README.md",
    "examples/*.ipynb",
]

myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks are shown with the outputs they are committed with; a test runs them
default_role = "code"  # docstrings write `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "fastcr"
html_copy_source = False
html_static_path = ["site"]
html_css_files = ["tables.css"]


def menu() -> dict[str, dict[str, str]]:
    """The start page's lists of links: pages (from the root) and their titles, by heading."""
    found: dict[str, dict[str, str]] = {}
    for line in (ROOT / f"{START}.md").read_text().splitlines():
        if line.startswith("## "):
            pages = found[line[3:]] = {}
        elif link := re.match(r"- \[(.+?)\]\((\S+?)\.(?:md|ipynb)\)", line):
            pages[normpath(Path(START).parent / link[2])] = link[1]
    return found


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """The start page's lists are the menu of the site."""
    if name == START:
        for caption, pages in menu().items():
            entries = "\n".join(f"{title} </{page}>" for page, title in pages.items())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def unlink_folders(app: Sphinx, name: str, source: list[str]) -> None:
    """A link to a folder leads to its page, where it has one; a site has no other folders."""

    def page(link: re.Match[str]) -> str:
        folder = (ROOT / name).parent / link[2]
        if not folder.is_dir():
            return link[0]
        return f"[{link[1]}]({link[2].rstrip('/')}/README.md)" if (folder / "README.md").is_file() else link[1]

    source[0] = re.sub(r"(?<!!)\[([^\[\]]+)\]\(([^)\s#:]+)\)", page, source[0])


def keep_colons(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what is before a colon in the first line about an attribute for its type."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def lead_to_start(app: Sphinx, error: Exception | None) -> None:
    """The site's address itself leads to the start page."""
    if error is None and app.builder.name == "html":
        page = f'<!doctype html><title>fastcr</title><meta http-equiv="refresh" content="0; url={START}.html">'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_navigation)
    app.connect("source-read", unlink_folders)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
    app.connect("build-finished", lead_to_start)
