"""What the site takes from outside docs/: MathJax, the changelog, and every file that a page links to.

A hook of mkdocs. Pages link to code, tests and other files by relative paths, which work wherever the repository is
browsed. The site holds those files too, each as a page under source/, so that it can be read without the repository.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages with a place in the navigation, whose files are not in docs/ or are not Markdown.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/notebooks/fit.ipynb": "notebooks/fit.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
SCRIPTS = re.compile(r'<script src="[^"]*assets/(?:mathjax|tex-svg)\.js"></script>')
LANGUAGES = {
    ".py": "python",
    ".yml": "yaml",
    ".yaml": "yaml",
    ".cff": "yaml",
    ".toml": "toml",
    ".sh": "bash",
    "": "make",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add MathJax, the pages from outside docs/, and the files that pages link to."""
    (mathjax,) = (file for file in distribution("sphinx-mathjax-offline").files or [] if file.name == "tex-svg.js")
    files.append(File.generated(config, "assets/tex-svg.js", abs_src_path=str(mathjax.locate())))
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=_read(name)))
    linked = {
        target
        for file in files.documentation_pages()
        for target in (_target(file.src_uri, link) for link in LINK.findall(file.content_string))
        if target is not None and not target.startswith("docs/") and target not in PAGES
    }
    for target in sorted(linked):
        files.append(File.generated(config, _uri(target), content=_shown(target)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Lead links that leave docs/ to the site's own copies."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = _target(here, match[1])
        return match[1] if target is None else os.path.relpath(_uri(target), Path(here).parent)

    return LINK.sub(moved, markdown)


def on_post_page(output: str, **kwargs: Any) -> str:
    """Load MathJax, 2 MB, on pages with formulas alone."""
    return output if 'class="arithmatex"' in output else SCRIPTS.sub("", output)


def _target(page: str, link: str) -> str | None:
    """The path within the repository of a link that leads to no page in docs/; None for all other links."""
    homes = {uri: name for name, uri in PAGES.items()}
    home = ROOT / homes[page] if page in homes else ROOT / "docs" / page
    path = Path(os.path.normpath(home.parent / link))
    if not path.is_relative_to(ROOT) or not path.exists():
        return None
    name = path.relative_to(ROOT).as_posix()
    if page in homes and name.startswith("docs/"):
        return name
    return None if name.startswith("docs/") and name not in PAGES else name


def _uri(name: str) -> str:
    if name in PAGES:
        return PAGES[name]
    return name.removeprefix("docs/") if name.startswith("docs/") else f"source/{name}.md"


def _read(name: str) -> str:
    """A file as Markdown: a notebook's cells one after the other, anything else as it stands."""
    if not name.endswith(".ipynb"):
        return (ROOT / name).read_text(encoding="utf-8")
    cells: list[Any] = nbformat.read(ROOT / name, as_version=4).cells  # type: ignore[no-untyped-call]
    return "\n\n".join(f"```python\n{c.source}\n```" if c.cell_type == "code" else c.source for c in cells)


def _shown(name: str) -> str:
    """A page that shows a file, or lists a folder."""
    path = ROOT / name
    if path.is_dir():
        body = "\n".join(f"- {file.name}" for file in sorted(path.iterdir()))
    else:
        body = f"~~~~~~{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n~~~~~~"
    return f"---\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n\n# {name}\n\n{body}\n"
