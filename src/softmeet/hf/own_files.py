"""Which files a saved ensemble may read: those of ensembles that were saved here, and those that are named beside it.

Else whoever wrote a saved ensemble could have it read, and tell in its answers, what is in any folder of whoever loads
it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence

from softmeet.derived import file_of
from softmeet.errors import cannot_load
from softmeet.hf.remembered import keep, known
from softmeet.members.files import Files, is_files

# Holds hashes, as paths are nobody else's business.
_FILE, _SAVED = "saved_files.json", "saved"


def saved_lines(lines: Sequence[str]) -> list[str]:
    """Return lines as a saved ensemble has them, with absolute paths, and remember that they were saved here."""
    for line in filter(is_files, lines):
        keep(file_of(_FILE), _of(line), _SAVED, True)
    return [str(Files.parse(line).absolute) if is_files(line) else line for line in lines]


def with_own(saved: Sequence[str], named: Sequence[str], where: str, trusted: bool) -> list[str]:
    """Return the lines of what claims beside members: those of a saved ensemble that are not named, then those named.

    Args:
        saved: of the saved ensemble.
        named: those that are named beside it.
        where: the ensemble, for the message.
        trusted: whether code that comes with it may run, which could read anything.

    Raises:
        CheckpointError: if the saved ensemble would read files that were neither saved here nor are named.
    """
    meant = {_of(line) for line in named if is_files(line)}
    kept = [line for line in saved if not (is_files(line) and _of(line) in meant)]
    here = known(file_of(_FILE))
    foreign = [line for line in kept if is_files(line) and _of(line) not in here]
    if foreign and not trusted:
        raise cannot_load(
            where,
            f"it was not saved here, and would read files of yours: {' '.join(foreign)}; if you mean them, name them "
            f"yourself, as in softmeet chat {shlex.join([where, *foreign])}, or take them out of its config.json",
        )
    return [*kept, *named]


def _of(line: str) -> str:
    """Return a hash of the files that a line names, whatever they count."""
    files = Files.parse(line).absolute
    return hashlib.sha256(json.dumps([sorted(files.paths), files.include]).encode()).hexdigest()
