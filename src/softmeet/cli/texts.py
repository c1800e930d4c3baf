"""Flags that ``trace``, ``evaluate`` and ``fit`` share, and early checks of them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import typer

from softmeet.cli.flags import Flags, at_least_one, flag, optional, switch
from softmeet.cli.messages import say, stoppable
from softmeet.cli.progress import progress
from softmeet.errors import InvalidInputError
from softmeet.evaluation.documents import Document, decode_utf8, read_documents
from softmeet.members.member import Member
from softmeet.members.registered import refuse_servers

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble
    from softmeet.evaluation.positions import Positions


_TEXT = (
    "Text to read: a UTF-8 file, a pattern such as 'books/*.txt', a dataset folder written by datasets.save_to_disk, "
    "or - for stdin; it can be repeated."
)


class DocumentFlags(Flags, panel="Text"):
    """Flags for which text is read."""

    text: list[str] | None = optional(_TEXT, "--text", "-t", metavar="PATH")
    separator: str | None = optional(
        r"The text that separates documents in a file; write \n for a line end.", shown="each file is one document"
    )
    column: str = flag("text", "The column of a dataset folder that holds the text.")

    @stoppable("the text was being read, and nothing is changed")
    def documents(self) -> list[Document]:
        """Read the documents that ``--text`` names.

        Raises:
            InvalidInputError: if no text is named, or one is empty or not UTF-8.
            OSError: if a file cannot be read.
        """
        ends = argument_text(self.separator or "").replace("\\n", "\n").replace("\\t", "\t") or None
        return read_documents(self.text or [], separator=ends, column=self.column)


class TextFlags(DocumentFlags):
    """Flags for which text is read, and how it is cut into windows."""

    window: int | None = at_least_one(
        "The length, in tokens, of the windows in which a document is read.",
        shown="the shortest context length among the members, at most 1024",
    )
    stride: int | None = at_least_one(
        "How many tokens after the start of one window the next one starts. Fewer than --window give tokens more "
        "context and take longer. Each token is predicted once.",
        shown="the window",
    )
    bos: bool = switch(
        "Begin each document with the token for the beginning of a text (BOS), so that its first token is predicted, "
        "too."
    )
    max_tokens: int | None = at_least_one("The most tokens (over bytes: bytes) to predict in all.", shown="all")
    max_per_document: int | None = at_least_one(
        "The most tokens (over bytes: bytes) to predict in each document.", shown="all"
    )

    @property
    def windowing(self) -> dict[str, Any]:
        """The values of ``window``, ``stride``, ``bos``, ``max_tokens`` and ``max_per_document``, by these names."""
        names = ("window", "stride", "bos", "max_tokens", "max_per_document")
        return {name: getattr(self, name) for name in names}

    @property
    def surely_read(self) -> int | None:
        """Over bytes, how many bytes of a long document are surely read at once; None for all that a window has."""
        given = [most - 1 for most in (self.window, self.max_tokens, self.max_per_document) if most is not None]
        return min(given, default=None)


class SourceFlags(TextFlags):
    """Flags that name a text, or a trace: a folder with the members' hidden states over a text."""

    trace: Path | None = optional(
        "The folder of a trace by softmeet trace, in place of --text. Without -m, the members of the trace are used; "
        "with it, name the same ones in the same order."
    )

    def documents(self) -> list[Document]:
        """Read the documents that ``--text`` names; return an empty list if ``--trace`` is given instead.

        Raises:
            InvalidInputError: if no text and no trace is named, or both are, or a text is empty or not UTF-8.
            OSError: if a file cannot be read.
        """
        if self.trace is None:
            return super().documents()
        if self.text:
            raise InvalidInputError(f"expected --trace or --text, got both: {self.trace} holds a text of its own")
        return []

    def members(self, named: list[str] | None) -> list[str] | None:
        """Return the members named on the command line; without any, those recorded in the trace, if one is named.

        Args:
            named: the values of ``--member``; None if it was not given.

        Returns:
            the names; ``named`` itself if it names any or there is no trace.

        Raises:
            TraceError: if the trace is missing or damaged.
            InvalidInputError: if it names a member behind a server, as somebody else's may.
        """
        if named or self.trace is None:
            return named
        from softmeet.evaluation.trace import Trace

        found = Trace.open(self.trace).members
        refuse_servers(map(Member.parse, found), "a trace")
        return found

    def prune(self, otherwise: float | None) -> float | None:
        """Return the ``prune`` of the trace, if one over bytes is named, else ``otherwise``.

        Raises:
            TraceError: if the trace is missing or damaged.
        """
        if self.trace is None:
            return otherwise
        from softmeet.evaluation.trace import Trace

        found: float | None = Trace.open(self.trace).facts.get("prune", otherwise)
        return found

    def identified(self, ensemble: Ensemble, documents: list[Document]) -> tuple[Positions | None, dict[str, Any]]:
        """Read the trace, if one is named, and collect everything that the members and the text contribute to results.

        Args:
            ensemble: the members, and how they are combined.
            documents: the documents that :meth:`documents` returned; unused with a trace.

        Returns:
            (the trace's positions, up to ``--max-tokens``, or None without a trace; a dict, as JSON has it, that is the
            same only if members, dtypes, text and windows are the same, by which finished pieces are recognised).

        Raises:
            InvalidInputError: if the trace is damaged or of other members, or a flag for windows is given with a trace.
        """
        own = pinned(ensemble, documents) | self.windowing
        if self.trace is None:
            return None, own
        from softmeet.evaluation.trace import Trace

        if {self.window, self.stride, self.max_per_document} != {None} or self.bos:
            raise InvalidInputError(
                "a trace has its windows: --window, --stride, --bos and --max-per-document go with --text"
            )
        opened = Trace.open(self.trace)
        opened.require(ensemble)
        with progress() as begin:
            reading = f"reading the trace, in {ensemble.model.config.vocabulary}"
            positions = opened.read(say, begin(reading, 0, sum(opened.sizes)))
        # Part of the key, since pieces are numbered by the positions that were read.
        left_out = sorted(set(range(len(opened.sizes))) - set(positions.document.tolist()))
        damaged = {"documents left out": left_out} if left_out else {}
        own |= {name: opened.facts[name] for name in ("window", "stride", "bos")} | {"source": opened.key}
        return positions.take(slice(self.max_tokens)), own | damaged


def pinned(ensemble: Ensemble, documents: Sequence[Document]) -> dict[str, Any]:
    """Return what identifies members, their dtypes and a text, as JSON has it."""
    from softmeet.evaluation.trace import identity
    from softmeet.hf.claiming import fingerprints

    text = "".join(f"{document.name}\0{document.text}\0" for document in documents)
    dtypes = [str(head.dtype) for head in ensemble.model.member_heads]
    own = {**identity(ensemble), "dtypes": dtypes, "source": hashlib.sha256(text.encode()).hexdigest()}
    lines = ensemble.model.config.files
    return own | ({"files": [*lines, *fingerprints(lines)]} if lines else {})


class ResultFlags(Flags, panel="Output"):
    """Flags for where figures are written, and where finished pieces of work are kept until the command has ended."""

    as_json: Path | None = optional(
        "Write the numbers as JSON to this file, or with - to stdout; infinite values become null.", "--json"
    )
    resume: Path | None = optional("Save progress in this folder; the same command resumes from it.")
    force: bool = switch("Overwrite output files that exist.")

    def require(self, folder: Path | None, *files: Path | None) -> None:
        """Check that results can be written, and replace no file without ``--force``, before hours of work are done.

        Args:
            folder: a folder that the command writes in, beside that of ``--resume``, which is checked as well.
            files: files that it writes, beside the one of ``--json``, which is checked as well; None for none.

        Raises:
            InvalidInputError: as by :func:`require_places` and :func:`require_new`.
        """
        require_places(self.as_json, folder, self.resume)
        require_new(self.force, *filter(None, [*files, self.as_json]))

    def stoppable(self) -> Any:
        """Return a context in which Ctrl-C ends the command and says on stderr which of its work is kept, and where."""
        if self.resume is None:
            return stoppable("nothing is kept; softmeet trace keeps what it has done, and so does --resume FOLDER")
        return stoppable(f"finished pieces stay in {self.resume}; the same command goes on from there")

    def report(self, facts: dict[str, Any], table: Callable[[dict[str, Any]], None]) -> None:
        """Print figures on stdout, and then write them as JSON to the file named by ``--json``, if there is one.

        Args:
            facts: the figures, in the types of JSON; infinity and NaN become null there.
            table: a function that prints ``facts``; it is called at once. With ``--json -`` JSON is printed instead.

        Raises:
            TraceError: if the disk is full.
        """
        from softmeet.evaluation.files import as_json, write_json

        if self.as_json == Path("-"):
            typer.echo(as_json(facts))
        else:
            table(facts)
        if self.as_json not in (None, Path("-")):
            write_json(self.as_json, facts)


def argument_text(given: str) -> str:
    """Return an argument's text; where the locale could not decode its bytes, they are read as UTF-8.

    Raises:
        InvalidInputError: if they are not UTF-8 either, or if the text is the name of a model on this machine.
    """
    from softmeet.members.names import is_here

    if is_here(given):
        raise InvalidInputError(
            f"expected a text, but {given} is the name of a model: name models by -m (inspect takes them behind the "
            "text, too); a text of that name comes through a pipe, to -"
        )
    undecoded = any("\ud800" <= sign <= "\udfff" for sign in given)
    return decode_utf8("a text on the command line", os.fsencode(given)) if undecoded else given


def file_text(path: str | Path) -> str:
    """Read a whole file, or stdin for ``-``, as UTF-8.

    Raises:
        InvalidInputError: if it is not UTF-8.
        OSError: if it cannot be read.
    """
    if str(path) == "-":
        return decode_utf8("stdin", sys.stdin.buffer.read())
    return decode_utf8(str(path), Path(path).read_bytes())


def require_new(force: bool, *paths: Path) -> None:
    """Check that a command replaces no file, unless it is told to.

    Args:
        force: whether it may; then nothing is checked.
        paths: the files that it writes. Pipes, devices and ``-`` are no files.

    Raises:
        InvalidInputError: if one of them exists.
    """
    if found := next((path for path in paths if path.is_file() and not force), None):
        raise InvalidInputError(
            f"expected a new file, but {found} is there: name another one, or replace it by --force"
        )


def require_places(file: Path | None, *folders: Path | None) -> None:
    """Check that results can be written where they are to go, before a command does hours of work.

    Args:
        file: a file to be written; None or ``-`` if there is none.
        folders: folders to be written in, which need not exist yet; None for none.

    Raises:
        InvalidInputError: if the file's folder does not exist, the file is a folder, a folder is a file or lies under
            one, or writing there fails.
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
