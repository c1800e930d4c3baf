"""The page at /ui over bytes, in a real headless Chromium."""

from __future__ import annotations

import pytest
from browser import PATIENCE, needs_chromium
from playwright.sync_api import expect
from serving import running, serving_of

from softmeet import Ensemble

# Gradio's own, in its thread.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")]


@needs_chromium
def test_the_page_shows_characters_and_each_members_own_tokens(browser):
    with running(serving_of({"mixed": Ensemble.from_pretrained("mixed")}, ui=True)) as url:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"{url}/ui")
        page.wait_for_selector("#go")
        page.fill("#prompt textarea", "And the king said, caf\u00e9")
        page.click("#go")
        page.wait_for_selector("#left .tok")
        expect(page.locator("#left .cursor")).to_have_count(0, timeout=PATIENCE)
        characters = page.locator("#left .tok").all_inner_texts()
        assert all(len(text.replace("\u23ce\n", "\n")) == 1 for text in characters)
        page.locator("#left .tok").nth(4).click()
        page.wait_for_selector("#details .cards")
        cards = page.locator("#details .card")
        assert cards.locator("h4").all_inner_texts() == ["ensemble", "mixed/gpt2", "mixed/llama"]
        words = [text for card in cards.all()[1:] for text in card.locator("code").all_inner_texts()]
        assert max(map(len, words)) > 1
        assert "the character that came" in page.locator("#details").inner_text()
        assert "characters" in page.locator("#left .sum").first.inner_text()
        page.close()
