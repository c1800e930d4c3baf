"""The site: it builds without a broken link, has every public name, and reads without a network.

Screenshots are kept in build/screenshots.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from browser import PATIENCE, needs_chromium
from once import once

import softmeet

ROOT = Path(__file__).parents[2]
API = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
SHOTS = ROOT / "build" / "screenshots"
SHOWN = ["index", "guides/choosing-a-rule", "theory/worked-example", "reference/api/rules", "reference/performance"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return once(tmp_path_factory, "site", build)


def build(folder):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pages(site):
    """The pages that were written as such: not copies of files, and no page that says that there is none."""
    found = [file.relative_to(site).with_suffix("").as_posix() for file in site.rglob("*.html")]
    return sorted(name for name in found if not name.startswith("source/") and name != "404")


def documented():
    """The modules and the names that the API's pages ask for."""
    return [name for page in API for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.MULTILINE)]


def public_names():
    """All names that users may import: of the package, of softmeet.hf, and of every module with a place in the API."""
    names = {f"softmeet.{name}" for name in softmeet.__all__} - {"softmeet.__version__"}
    names |= {f"softmeet.hf.{name}" for name in importlib.import_module("softmeet.hf").__all__}
    for name in documented():
        file = ROOT / "src" / Path(*name.split(".")).with_suffix(".py")
        if file.is_file():
            tree = ast.parse(file.read_text())
            own = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
            names |= {f"{name}.{each}" for each in own if not each.startswith("_")}
    return sorted(names)


@pytest.mark.slow
def test_every_public_name_has_an_entry(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    entries = {line.split()[0] for line in inventory.splitlines()}
    assert not [name for name in public_names() if name not in entries]


@pytest.mark.parametrize("name", public_names())
def test_every_public_name_says_what_it_is(name):
    home, _, last = name.rpartition(".")
    found = getattr(importlib.import_module(home), last)
    assert name == "softmeet.RULES" or inspect.getdoc(found)


@pytest.mark.slow
def test_every_page_opens_with_what_it_is_for(site, pages):
    def opening(name):
        text = (site / f"{name}.html").read_text()
        body = text[text.index("<h1") :].partition("</h1>")[2].lstrip()
        return re.sub(r"<[^>]+>", "", body.partition("</p>")[0]) if body.startswith("<p>") else ""

    assert not [name for name in pages if len(opening(name)) < 80]


@needs_chromium
@pytest.mark.slow
def test_pages_read_without_a_network_on_a_phone_at_night(site, pages, browser):
    """Those whose formulas are set by scripts, and a few more, with scripts; others have no scripts but the theme's."""
    look = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "offline": True}
    scripted = {name for name in pages if 'class="arithmatex"' in (site / f"{name}.html").read_text()}
    assert len(scripted) > 5
    assert not complaints(browser.new_context(**look), site, sorted(scripted | {*SHOWN}))
    rest = sorted({*pages} - scripted)
    assert not complaints(browser.new_context(**look, java_script_enabled=False), site, rest)


@pytest.mark.slow
@needs_chromium
def test_pages_read_on_a_desk(site, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", offline=True)
    assert not complaints(context, site, SHOWN, shot=True)


def complaints(context, site, names, *, shot=False):
    """What is wrong with pages that are opened from their folder: requests, errors, raw formulas, a page too wide."""
    page, found, every = context.new_page(), [], {}
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: found.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda asked: found.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None)
    raw = "[...document.querySelectorAll('.arithmatex')].filter(e => !e.querySelector('mjx-container')).length"
    wide = "document.documentElement.scrollWidth - window.innerWidth"
    for name in names:
        page.goto((site / f"{name}.html").as_uri())
        page.evaluate("window.MathJax?.startup.promise")
        if shot:
            SHOTS.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=SHOTS / f"site-{name.replace('/', '-')}.png")
        found += ["a formula is not set"] * page.evaluate(raw)
        found += ["an error in a formula"] * page.locator("[data-mjx-error]").count()
        found += ["the page scrolls sideways"] * (page.evaluate(wide) > 0)
        if found:
            every[name] = found[:]
            found.clear()
    page.close()
    return every


@pytest.mark.slow
@needs_chromium
def test_search_finds_a_page_without_a_server(site, browser):
    page = browser.new_context(offline=True).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((site / "index.html").as_uri())
    page.locator("[data-md-component=search-query]").click()
    page.keyboard.type("different tokenizers", delay=20)
    page.locator(".md-search-result__link").first.wait_for(state="attached")
    links = [link.get_attribute("href") for link in page.locator(".md-search-result__link").all()]
    assert any("guides/vocabularies" in link for link in links), links
    page.close()
