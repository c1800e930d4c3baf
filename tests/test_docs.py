"""Every Python snippet of the README and the docs runs, top to bottom, one namespace a page."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)")


@pytest.mark.unchecked
@pytest.mark.parametrize("page", [p for p in PAGES if SNIPPET.search(p.read_text())], ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    from softmeet.rules import registry

    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in SNIPPET.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = [page.parent / target for target, _ in LINK.findall(page.read_text())]
    assert not [t for t in targets if not t.exists()]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".ensemble",
        ".heads",
        ".norms",
        ".simplex",
        ".rules.base",
        ".rules.combine",
        ".rules.registry",
        ".rules.settings",
    ],
)
def test_examples_in_docstrings_give_what_they_say(name, monkeypatch):
    from softmeet.rules import registry

    monkeypatch.setattr(registry, "_registered", {})
    found = doctest.testmod(importlib.import_module(f"softmeet{name}"))
    assert found.attempted
    assert not found.failed


def test_every_rule_is_documented():
    from softmeet import RULES

    readme = (ROOT / "README.md").read_text()
    assert not [rule.name for rule in RULES if f"`{rule.name}`" not in readme]


def test_the_mathematics_points_at_files_that_exist():
    page = (ROOT / "docs" / "mathematics.md").read_text()
    files = set(re.findall(r"`((?:solvers|rules|hf)/\w+\.py|\w+\.py)`", page))
    assert files
    assert not [f for f in files if not (ROOT / "src" / "softmeet" / f).exists()]


def test_the_help_in_the_docs_is_the_commands_own():
    from update_cli_docs import PAGE, page

    assert PAGE.read_text() == page(), "run: python tools/update_cli_docs.py"
