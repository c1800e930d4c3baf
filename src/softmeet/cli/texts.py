"""What ``trace``, ``evaluate``, ``fit`` and ``study`` share: text or a trace, where results go, and progress."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softmeet.cli import options
from softmeet.cli.flags import flag
from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.evaluation.documents import Document
    from softmeet.evaluation.positions import Positions


_TEXT = "A UTF-8 file, a pattern ('books/*.txt'), - for stdin, or a folder of save_to_disk's; repeat it."


@dataclass
class TextFlags:
    """Flags that say which text is read, and in which windows."""

    text: list[str] | None = flag(None, _TEXT, "--text", "-t")
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

    @options.stoppable("the text was being read, and nothing is changed")
    def documents(self) -> list[Document]:
        """Read the documents that the flags name.

        Raises:
            InvalidInputError: there is none, or one is empty or not UTF-8.
        """
        from softmeet.evaluation.documents import read_documents

        ends = self.separator.replace("\\n", "\n").replace("\\t", "\t") if self.separator else None
        return read_documents(self.text or [], separator=ends, column=self.column)


@dataclass
class SourceFlags(TextFlags):
    """Flags that name a text, or a trace, which holds the members' hidden states over a text."""

    trace: Path | None = flag(None, "A trace, in place of --text.")

    def documents(self) -> list[Document]:
        """Read the documents that the flags name; none where a trace holds them.

        Raises:
            InvalidInputError: as for :class:`TextFlags`; or both a text and a trace are named.
        """
        if self.trace is None:
            return super().documents()
        if self.text:
            raise InvalidInputError(f"expected --trace or --text, got both: {self.trace} holds a text of its own")
        return []

    def members(self, named: list[str] | None) -> list[str] | None:
        """Return the members that were named, else those that made the trace."""
        if named or self.trace is None:
            return named
        from softmeet.evaluation.trace import Trace

        return Trace.open(self.trace).members

    def identified(self, ensemble: Ensemble, documents: list[Document]) -> tuple[Positions | None, dict[str, Any]]:
        """Read the trace, if there is one, and identify what a command's figures depend on.

        Args:
            ensemble: the members, and how they are combined.
            documents: those of :meth:`documents`.

        Returns:
            The positions of the trace, or None without one; and facts that are the same only where figures are, as
            far as they depend on members and text.

        Raises:
            InvalidInputError: the trace is of other members or damaged, or a flag says how to cut it into windows.
        """
        from softmeet.evaluation.trace import identity

        dtypes = [str(head.weight.dtype) for head in ensemble.model.member_heads]
        pinned = {**identity(ensemble), "dtypes": dtypes, "max_tokens": self.max_tokens, **self.windows}
        if self.trace is None:
            text = "".join(f"{document.name}\0{document.text}\0" for document in documents)
            return None, {**pinned, "source": hashlib.sha256(text.encode()).hexdigest()}
        from softmeet.evaluation.trace import Trace

        if set(self.windows.values()) - {None, False}:
            raise InvalidInputError(
                "a trace has its windows: --window, --stride, --bos and --max-per-document go with --text"
            )
        opened = Trace.open(self.trace)
        opened.require(ensemble)
        positions, left_out = opened.read_whole(options.say)
        # Pieces are numbered over the positions that were read.
        damaged = {"shards left out": left_out} if left_out else {}
        return positions.take(slice(self.max_tokens)), {**pinned, "source": opened.key, **damaged}


@dataclass
class ResultFlags:
    """Flags that say where figures go, and where finished pieces stay until the command is through."""

    as_json: Path | None = flag(None, "Write the figures here as JSON, infinity as null; - for stdout.", "--json")
    resume: Path | None = flag(None, "A folder for finished pieces; the same command goes on from there.")

    def stoppable(self) -> Any:
        """Return a context in which Ctrl-C says what is left of the command."""
        if self.resume is None:
            return options.stoppable(
                "nothing is kept; softmeet trace keeps what it has done, and so does --resume FOLDER"
            )
        return options.stoppable(f"finished pieces stay in {self.resume}; the same command goes on from there")

    def tell(self, facts: dict[str, Any], table: Callable[[dict[str, Any]], None]) -> None:
        """Print figures by ``table``, or as JSON where that goes to stdout; before :meth:`write`, which may fail."""
        from softmeet.evaluation.files import as_json

        if self.as_json == Path("-"):
            typer.echo(as_json(facts))
        else:
            table(facts)

    def write(self, facts: dict[str, Any]) -> None:
        """Write figures as JSON to the file that is named, if one is."""
        from softmeet.evaluation.files import write_json

        if self.as_json not in (None, Path("-")):
            write_json(self.as_json, facts)


def require_extra(**packages: object) -> None:
    """Check at once, not after hours, that the packages of ``softmeet[eval]`` that are needed are installed.

    Args:
        packages: each package's name, with a true value if it is needed.

    Raises:
        InvalidInputError: one that is needed is missing.
    """
    if missing := [name for name, needed in packages.items() if needed and find_spec(name) is None]:
        raise InvalidInputError(f"this command needs {' and '.join(missing)}: pip install 'softmeet[eval]'")


def require_places(file: Path | None, *folders: Path | None) -> None:
    """Check at once, not after hours, that results can be written where they are to go.

    Args:
        file: a file to write; None or - for none.
        folders: folders to write in, which need not exist; None for none.

    Raises:
        InvalidInputError: the file's folder is not there, the file is a folder, a folder is a file or under one, or
            nothing can be written there.
    """
    written = []
    if file not in (None, Path("-")):
        if file.is_dir() or not file.parent.is_dir():
            raise InvalidInputError(f"expected a file in a folder that is there, got {file}: make {file.parent} first")
        written += [file.parent] if file.is_file() or not file.exists() else []
    for folder in filter(None, folders):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InvalidInputError(f"expected a folder, got {folder}, but {there} is a file: name another one")
        written.append(there)
    for folder in written:
        try:
            TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InvalidInputError(f"cannot write in {folder} ({error.strerror}): name another folder") from None


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], Callable[[int], None]]]:
    """Show progress bars on stderr while the context lasts.

    Yields:
        A function of (description, how much is done, how much there is in all or None) that adds a bar, and returns
        the function that advances the bar by a count.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=options.err, transient=True) as bars:

        def begin(description: str, done: int, total: int | None) -> Callable[[int], None]:
            task: Any = bars.add_task(description, completed=done, total=total)
            return lambda count: bars.advance(task, count)

        yield begin
