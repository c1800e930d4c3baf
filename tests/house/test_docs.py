"""Every Python snippet of the README and the docs runs, top to bottom, one namespace a page."""

from __future__ import annotations

import doctest
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "src" / "softmeet"
EXAMPLES = [file for file in sorted(PACKAGE.rglob("*.py")) if ">>> " in file.read_text()]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)")


@pytest.fixture(scope="module")
def loaded():
    """The bundled members that were loaded."""
    return {}


@pytest.fixture
def loading_once(loaded, monkeypatch):
    """Have no bundled member loaded twice, though every page and docstring begins with loading some."""
    from softmeet import Ensemble

    load = Ensemble.from_pretrained
    monkeypatch.setattr(Ensemble, "from_pretrained", functools.partial(load, loaded=loaded))


@pytest.mark.slow
@pytest.mark.usefixtures("loading_once")
@pytest.mark.parametrize("page", [p for p in PAGES if SNIPPET.search(p.read_text())], ids=lambda p: p.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    from softmeet.rules import registry

    monkeypatch.setattr(registry.RULES, "_registered", {})
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for code in SNIPPET.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = [page.parent / target for target, _ in LINK.findall(page.read_text())]
    assert not [t for t in targets if not t.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_installs_is_in_the_clone_or_at_its_address(page):
    assert not re.findall(r"pip install ['\"]?softmeet\b(?!-)(?!\[\w+\] @ git\+ADDRESS).*", page.read_text())


@pytest.mark.usefixtures("loading_once")
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_examples_in_docstrings_give_what_they_say(file, monkeypatch):
    from softmeet.rules import registry

    monkeypatch.setattr(registry.RULES, "_registered", {})
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed


def test_every_rule_is_documented():
    from softmeet import RULES

    page = (ROOT / "docs" / "guides" / "choosing-a-rule.md").read_text()
    assert not [rule.name for rule in RULES if f"`{rule.name}`" not in page]


@pytest.fixture(scope="module")
def known():
    """Every file of ours, as a page may name it: from the root, the package, the tests, or a room of theirs."""
    folders = ("src", "zoo", "tests", "tools", "benchmarks", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    roots = (ROOT, PACKAGE, ROOT / "tests", *(ROOT / "tests").iterdir())
    return {str(file.relative_to(root)) for root in roots for file in files if file.is_relative_to(root)}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_files_that_a_page_names_exist(page, known):
    names = set(re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text()))
    folders = {line.split("`")[1] for line in page.read_text().splitlines() if line.startswith("| `") and "/`" in line}
    inside = {file.name for folder in folders for file in (PACKAGE / folder).glob("*.py")}
    written = {"softmeet_minimum.py", "softmeet_bigrams.py"}  # which guides have their readers write
    assert not sorted(names - known - inside - written)


def test_the_help_in_the_docs_is_the_commands_own():
    from update_cli_docs import PAGE, page

    assert PAGE.read_text() == page(), "run: python tools/update_cli_docs.py"


def test_the_worked_example_is_drawn_from_what_its_page_says(tmp_path):
    import simplex

    page = (ROOT / "docs" / "theory" / "worked-example.md").read_text()
    rows = {
        trust: point.split(",") for trust, point in re.findall(r"^\| ([\d.]+) .*\| \((.+)\) \|", page, re.MULTILINE)
    }
    assert set(rows) == {"0", *(f"{trust:g}" for trust in simplex.TRUSTS)}
    for trust, point in rows.items():
        assert simplex.combined(simplex.RIGHT, f"meet:trust={trust}") == pytest.approx([*map(float, point)], abs=1e-4)
    simplex.main(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"simplex.png", "simplex-wrong.png"}


def test_the_docs_home_begins_as_the_readme_does():
    readme, home = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/index.md"))
    title, pitch, picture, *_ = readme.split("\n\n")
    assert home.startswith("\n\n".join((title, pitch, picture.replace("docs/", ""))))
