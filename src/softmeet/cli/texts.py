"""What ``trace``, ``evaluate`` and ``fit`` share: members, text and its windows, progress, and being stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softmeet.cli import options
from softmeet.cli.flags import flag
from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.evaluation.documents import Document


@dataclass
class Reading:
    """Which text, and how members read it."""

    text: list[str] | None = flag(
        None,
        "A UTF-8 file, a pattern ('books/*.txt'), - for stdin, or a folder of save_to_disk's; repeat it.",
        "--text",
        "-t",
    )
    separator: str | None = flag(None, r"Splits a file into documents; \n is a line end.", shown="a file is one")
    column: str = flag("text", "Of a dataset, the column that holds the text.")
    window: int | None = flag(None, "Tokens that a member reads at once.", shown="shortest context, at most 1024")
    stride: int | None = flag(None, "From one window to the next; each token counts once.", shown="the window")
    bos: bool = flag(False, "Begin each document with the token that begins a text.", "--bos")
    max_tokens: int | None = flag(None, "Predictions in all, at most.", min=1)
    max_per_document: int | None = flag(None, "Predictions in each document, at most.", min=1)

    @property
    def windows(self) -> dict[str, Any]:
        """How documents are cut, under the names that evaluation has."""
        return {name: getattr(self, name) for name in ("window", "stride", "bos", "max_per_document")}

    def documents_unless(self, trace: Path | None) -> list[Document] | None:
        """Give the documents that the options name, or None where a trace holds them.

        Raises:
            InvalidInputError: as :meth:`documents`, or both are named.
        """
        if trace is None:
            return self.documents()
        if self.text:
            raise InvalidInputError(f"expected --trace or --text, got both: {trace} holds a text of its own")
        return None

    @options.stoppable("the text was being read, and nothing is changed")
    def documents(self) -> list[Document]:
        """Give the documents that the options name.

        Raises:
            InvalidInputError: there is none, or one is empty or not UTF-8.
        """
        from softmeet.evaluation.documents import read_documents

        ends = self.separator.replace("\\n", "\n").replace("\\t", "\t") if self.separator else None
        return read_documents(self.text or [], separator=ends, column=self.column)


def require_extra(**packages: object) -> None:
    """Refuse at once, not after hours, where a package of ``softmeet[eval]`` is missing.

    Args:
        packages: by name, and whether they are needed.

    Raises:
        InvalidInputError: one that is needed is missing.
    """
    if missing := [name for name, needed in packages.items() if needed and find_spec(name) is None]:
        raise InvalidInputError(f"this command needs {' and '.join(missing)}: pip install 'softmeet[eval]'")


def require_places(file: Path | None, *folders: Path | None) -> None:
    """Refuse at once what could not be written in the end.

    Args:
        file: of JSON; None or - for none.
        folders: that are there or are to be made.

    Raises:
        InvalidInputError: the file's folder is not there, the file is a folder, a folder is a file or under one, or
            nothing can be written there.
    """
    if file not in (None, Path("-")) and file.parent.is_dir() and (file.is_file() or not file.exists()):
        _require_writable(file.parent)
    if file not in (None, Path("-")) and (file.is_dir() or not file.parent.is_dir()):
        raise InvalidInputError(f"expected a file in a folder that is there, got {file}: make {file.parent} first")
    for folder in folders:
        there = folder and next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if there and not there.is_dir():
            raise InvalidInputError(f"expected a folder, got {folder}, but {there} is a file: name another one")
        if there:
            _require_writable(there)


def _require_writable(folder: Path) -> None:
    try:
        with TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise InvalidInputError(f"cannot write in {folder} ({error.strerror}): name another folder") from None


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], Callable[[int], None]]]:
    """Bars on stderr: call what it gives with (description, done, total), and the answer with each advance."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=options.err, transient=True) as bars:

        def begin(description: str, done: int, total: int | None) -> Callable[[int], None]:
            task: Any = bars.add_task(description, completed=done, total=total)
            return lambda count: bars.advance(task, count)

        yield begin


def default_members(members: list[str] | None, trace: Path | None) -> list[str] | None:
    """The members that were named, else those that made the trace."""
    if members or trace is None:
        return members
    from softmeet.evaluation.trace import Trace

    return Trace.open(trace).members
