"""Write the golden texts of tests/matrix anew, and why into the changelog: python tools/update_golden.py --because ….

Without ``--because`` it says which cases would change, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parents[1]
CHANGELOG = ROOT / "CHANGELOG.md"
_LINE = re.compile(r"^- Golden texts [0-9a-f]+: .*\n", re.MULTILINE)


def noted(changelog: str, digest: str, reason: str) -> str:
    """Return the changelog with a line for these golden texts in place of the newest version's, or under its changes.

    Args:
        changelog: its text.
        digest: of the golden texts.
        reason: why they are others than before.
    """
    line = f"- Golden texts {digest}: {reason}\n"
    newest, rest = _newest(changelog)
    if _LINE.search(newest):
        return _LINE.sub(lambda _: line, newest) + rest
    return newest.replace("### Changed\n\n", f"### Changed\n\n{line}", 1) + rest


def _newest(changelog: str) -> tuple[str, str]:
    """Return what comes before the second version, and the rest."""
    starts = [found.start() for found in re.finditer(r"^## ", changelog, re.MULTILINE)]
    end = starts[1] if len(starts) > 1 else len(changelog)
    return changelog[:end], changelog[end:]


def main() -> None:
    """Compare the golden texts with what the code writes, and where there is a reason, replace them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--because", metavar="REASON", help="one sentence for the changelog: why texts are others now")
    reason = parser.parse_args().because
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "matrix")]
    logging.disable()
    disable_progress_bar()
    with TemporaryDirectory() as folder:
        os.environ["SOFTMEET_CACHE"] = f"{folder}/cache"
        golden: Any = importlib.import_module("golden")
        worlds: Any = importlib.import_module("worlds").make_worlds(Path(folder))
        known, found = golden.texts(), golden.made(worlds)
    changed = [name for name in found if found[name] != known.get(name)] + [name for name in known if name not in found]
    for name in changed:
        before, after = (entries.get(name, {}).get("text") for entries in (known, found))
        print(f"{name}: {before!r} → {after!r}")
    if reason:
        golden.write(found)
        CHANGELOG.write_text(noted(CHANGELOG.read_text(encoding="utf-8"), golden.digest(), reason), encoding="utf-8")
    elif not changed:
        print("the golden texts are what the code writes")
    else:
        sys.exit(f"{len(changed)} of {len(found)} cases would change: say --because REASON to write them anew")


if __name__ == "__main__":
    main()
