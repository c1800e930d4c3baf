"""Options that several commands share, and what turns them into an ensemble."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from softmeet.cli.flags import checked_settings, flag
from softmeet.cli.memory import uncollected
from softmeet.cli.old_forms import repeated
from softmeet.errors import InvalidInputError
from softmeet.members.zoo import DEFAULT as DEFAULT
from softmeet.members.zoo import short as short

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

err = Console(stderr=True)
STOPPED = 130

Members = Annotated[
    list[str] | None,
    typer.Option(
        "--member",
        "-m",
        help="A hub id, folder, GGUF file, bundled name or saved ensemble; repeat it.",
        show_default="wide",
    ),
]


def placement(given: list[str] | None) -> Any:
    """One place for all members, or one each; a YAML or JSON file → what it holds.

    Raises:
        InvalidInputError: the file is not YAML, or holds neither a map nor a list.
    """
    places = repeated("--device", given)
    if not places:
        return None
    device = places[0] if len(places) == 1 else ""
    if not device.endswith((".yaml", ".yml", ".json")):
        return device or places
    import yaml

    try:
        found = yaml.safe_load(Path(device).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InvalidInputError(f"expected YAML or JSON in {device}: {error}") from None
    if not isinstance(found, dict | list):
        raise InvalidInputError(
            f"expected {device} to hold a device for each module, or a list with one entry per member, got {found!r}"
        )
    return found


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Ctrl-C ends the command with a sentence and the exit code ``STOPPED``."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped: {advice}")
        raise typer.Exit(STOPPED) from None


@dataclass
class Loading:
    """Say in which dtype and where members are loaded, and whether their own code may run."""

    dtype: str | None = flag(None, "float32, bfloat16, float16, float64 or auto.", shown="float32 on CPU")
    device: list[str] | None = flag(
        None,
        "Such as cpu, cuda, disk or auto (accelerate's choice), for all members, or repeated for each; or a YAML or "
        "JSON file with a place for each module, or a list of such maps and places, one per member.",
        shown="cpu",
    )
    trust_remote_code: bool = flag(False, "Run code that comes with a checkpoint.", "--trust-remote-code")
    vocabulary: str | None = flag(
        None,
        "What members are combined over: tokens, which they have to share; bytes, by an average; or auto.",
        shown="auto: bytes where tokenizers differ",
    )
    prune: float | None = flag(
        None, "Over bytes, the share of mass from which a tokenization is followed; 0 for all.", shown="0.01", min=0
    )

    def arguments(self) -> dict[str, Any]:
        """Give the options as arguments of ``Ensemble.from_pretrained``, devices read."""
        return {**vars(self), "device": placement(self.device)}

    @stoppable("members were being loaded, and nothing is changed")
    def ensemble(self, members: list[str] | None, settings: Mapping[str, Any] | None = None, **more: Any) -> Ensemble:
        """Load with progress on stderr, and without transformers' own chatter.

        Args:
            members: names; the default family if there is none.
            settings: as their flags have them.
            more: of ``Ensemble.from_pretrained``.

        Raises:
            InvalidInputError, CheckpointError, VocabularyMismatchError, UnsupportedHeadError: as ``Ensemble``.
        """
        given = checked_settings(settings or {})
        with status("loading softmeet"), uncollected():
            from transformers.utils import logging

            from softmeet.ensemble import Ensemble

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        with err.status("loading") as progress:
            return Ensemble.from_pretrained(
                members[0] if members and len(members) == 1 else members or [DEFAULT],
                on_progress=lambda name: progress.update(f"loading {escape(short(name))}"),
                **self.arguments(),
                **given,
                **more,
            )


def say(sentence: str) -> None:
    """Print a notice on stderr, so that stdout holds results alone."""
    err.print(sentence, style="yellow", highlight=False, soft_wrap=True, markup=False)


def status(message: str) -> AbstractContextManager[Any]:
    """A spinner on stderr, if it is a terminal."""
    return err.status(message)
