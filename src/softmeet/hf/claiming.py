"""Giving an ensemble the user's own files, over its symbols; and which files a saved ensemble may read.

Those are the files of ensembles that were saved here, and those that are named beside it. Else whoever wrote a saved
ensemble could have it read, and tell in its answers, what is in any folder of whoever loads it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from softmeet.derived import file_of
from softmeet.errors import CheckpointError, InvalidInputError, cannot_load
from softmeet.hf.remembered import keep, known
from softmeet.members.files import Files, is_files
from softmeet.members.gguf_file import fingerprint
from softmeet.members.member import Member
from softmeet.members.registered import registered_reader
from softmeet.readers.byte_alphabet import ByteAlphabet
from softmeet.readers.files.corpus import Corpus, find_texts
from softmeet.readers.files.index import Index
from softmeet.readers.files.reader import FilesReader
from softmeet.readers.guarded import GuardedReader
from softmeet.readers.reader import Reader
from softmeet.readers.token_alphabet import TokenAlphabet

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

_log = logging.getLogger("softmeet.files")
# Holds hashes, as paths are nobody else's business.
_FILE, _SAVED = "saved_files.json", "saved"


def give_claims(
    model: AnyEnsemble, on_progress: Callable[[str], None] = lambda text: None, without: Collection[Path] = ()
) -> None:
    """Have the files and readers that a model's configuration names claim their part of what its rule answers.

    Args:
        model: the model.
        on_progress: called with what is done.
        without: files that are left out, as they are held out; the index of the others is then not kept.

    Raises:
        InvalidInputError: if the ensemble is over the union of tokens, or a member takes no cache.
        CheckpointError: if there are no such files.
    """
    if not model.config.files:
        return
    if model.config.vocabulary.startswith("union"):
        raise InvalidInputError("expected files beside members over tokens or bytes, got vocabulary='union'")
    model.claimants = [
        _reader(model, Files.parse(line), on_progress, without) if is_files(line) else _registered(model, line)
        for line in model.config.files
    ]


def files_of(model: AnyEnsemble) -> list[Files]:
    """Return the user's files that stand beside the members of a model."""
    return [Files.parse(line) for line in model.config.files if is_files(line)]


def texts_of(files: Files) -> Corpus:
    """Return which files are read."""
    return find_texts(files.paths, files.include, file_of("files"))


def fingerprints(lines: Iterable[str]) -> list[str]:
    """Return what tells apart what was read of files, by their lines of text; of other readers nothing is known."""
    return [fingerprint(path) for line in lines if is_files(line) for path in texts_of(Files.parse(line)).files]


def _registered(model: AnyEnsemble, line: str) -> Reader:
    """Return a registered reader that claims, if its symbols are those of a model."""
    reader: Reader = registered_reader(Member.parse(line))
    if not reader.traits.claims:
        raise InvalidInputError(f"expected a reader that claims of {line}, as its factory says so: see its traits")
    alphabet, own = symbols_of(model), reader.alphabet
    text = "".join(chr(k) for k in range(33, 256))
    if own.size != alphabet.size or own.encode(text) != alphabet.encode(text):
        raise InvalidInputError(
            f"expected a reader over the symbols of the other members, {alphabet.size:,} of them, got {line} with "
            f"{own.size:,}: give it their tokenizer"
        )
    return GuardedReader(reader)


def _reader(
    model: AnyEnsemble, files: Files, on_progress: Callable[[str], None], without: Collection[Path]
) -> FilesReader:
    def tell(what: str, done: int, total: int) -> None:
        on_progress(f"{files.title}: {what} {done:,} of {total:,}")

    alphabet, support = symbols_of(model), model.combiner.support
    texts = texts_of(files)
    texts = replace(texts, files=tuple(path for path in texts.files if path not in without))
    made = alphabet.encode_all, alphabet.size, alphabet.identity, file_of("files"), tell
    index = Index.of(texts, *made, keep=not without)
    left_out = ", ".join(f"{count:,} {why}" for why, count in index.left_out.items())
    if not len(index.symbols):
        raise CheckpointError(f"found no text in {files}" + (f"; left out: {left_out}" if left_out else ""))
    _log.warning(
        "%s: %s files of %s %s%s", files.title, f"{len(index.starts):,}", f"{len(index.symbols):,}",
        model.config.vocabulary, f"; left out: {left_out}" if left_out else "",
    )  # fmt: skip
    allowed = None if support is None else support.cpu().numpy()
    folders = list(dict.fromkeys(_folder(Path(path)) for path in texts.paths))
    return FilesReader(files.title, alphabet, index, allowed, files.weight, files.relevance, folders)


def _folder(path: Path) -> Path:
    """Return a folder that was named, or the one that a file or a glob is in."""
    return next(one for one in (path, *path.parents) if one.is_dir())


def symbols_of(model: AnyEnsemble) -> TokenAlphabet | ByteAlphabet:
    """Return the symbols that the members of a model share."""
    return cast(TokenAlphabet | ByteAlphabet, model.readers_of_members[0].alphabet)


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
