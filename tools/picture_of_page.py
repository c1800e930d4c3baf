"""Take docs/images/page.png, the page at /ui of a server that runs: python tools/picture_of_page.py URL 'a beginning'

softmeet serve wide &
python tools/picture_of_page.py http://127.0.0.1:8000 "And the king said unto his daughter,"
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WRITTEN = Path(__file__).parents[1] / "docs" / "images" / "page.png"


def main() -> None:
    """Have the text go on, choose the first word that a model doubted, and take the picture."""
    url, beginning = sys.argv[1:]
    with sync_playwright() as player:
        page = player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]).new_page(
            viewport={"width": 1180, "height": 760}, device_scale_factor=1.5
        )
        page.goto(f"{url}/ui/#inside")
        page.fill("#seed", "4")
        page.fill("#length", "60")
        page.fill("#prompt", beginning)
        page.click("#go")
        page.wait_for_selector("#text.writing", state="detached")
        page.locator("#text .tok.doubt, #text .tok").first.click()
        if page.locator("#text .tok.doubt").count():
            page.locator("#text .tok.doubt").first.click()
        page.evaluate("window.scrollTo(0, 130)")
        page.screenshot(path=WRITTEN)


if __name__ == "__main__":
    main()
