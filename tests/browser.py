"""Where Chromium is, and what to do where it is not."""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 300_000  # milliseconds
# CI says that a browser has to be there; elsewhere a missing one is no reason to fail.
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and "REQUIRE_CHROMIUM" not in os.environ, reason="there is no chromium: apt-get install chromium"
)
