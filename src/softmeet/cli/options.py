"""Options that several commands share, and what turns them into an ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from softmeet.errors import InvalidInputError
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
RuleName = Annotated[
    str | None,
    typer.Option(
        "--rule",
        help="meet, max-entropy, least-squares, min-cross-entropy, min-squared-cross-entropy, min-underestimation, "
        "min-reverse-cross-entropy, logit-mean, prob-mean or one-hot.",
        show_default="meet",
    ),
]
Trust = Annotated[
    str | None, typer.Option("--trust", help="ρ for all members, or one each: 0.3 or 0.3,1,inf.", show_default="0.3")
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="Pool weights, one each: 0.3,0.7.", show_default="uniform")
]
PoolName = Annotated[str | None, typer.Option("--pool", help="logit-mean or prob-mean.", show_default="logit-mean")]
Tolerance = Annotated[
    float | None,
    typer.Option("--tol", help="Duality gap in nats at which a token is solved.", show_default="0.0001"),
]
OnInfeasible = Annotated[
    str | None,
    typer.Option(
        "--on-infeasible", help="meet or raise: where no distribution has every member's moments.", show_default="meet"
    ),
]
Rank = Annotated[
    int | None, typer.Option("--rank", min=1, help="Largest directions of each head to constrain.", show_default="all")
]
FreeRadial = Annotated[
    bool | None, typer.Option("--free-radial", help="Do not constrain the directions that the final norm hides.")
]
Metric = Annotated[
    str | None, typer.Option("--metric", help="Of least-squares: whitened or raw.", show_default="whitened")
]
Slack = Annotated[
    float | None,
    typer.Option("--slack", help="Of the min-…cross-entropy programs: τ of ‖Qᵀ(p - p̂)‖² / 2τ.", show_default="0"),
]
Vertex = Annotated[bool | None, typer.Option("--vertex", help="Answer programs that choose nothing by some vertex.")]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        help="unsure:T asks the other members only where the first one's largest probability is below T; "
        "disagreement:T solves only where members disagree by more than T nats; none.",
        show_default="none",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16, float64 or auto.", show_default="float32 on CPU"),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Such as cpu, cuda, disk or auto (accelerate's choice); one each: cuda:0,cuda:1; or a YAML or JSON file "
        "with a place for each module, or a list of such maps and places, one per member.",
        show_default="cpu",
    ),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.")]


def numbers(name: str, text: str | None) -> list[float] | float | None:
    """``0.3`` → 0.3; ``0.3,1,inf`` → [0.3, 1, inf].

    Raises:
        InvalidInputError: not numbers.
    """
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError(
            f"expected {name} as numbers separated by commas, such as 0.3,0.7, got {text!r}"
        ) from None
    return values[0] if len(values) == 1 else values


def placement(device: str | None) -> Any:
    """``cuda:0,cuda:1`` → one each; a YAML or JSON file → what it holds; anything else as it is.

    Raises:
        InvalidInputError: the file is not YAML, or holds neither a map nor a list.
    """
    if device is None or not device.endswith((".yaml", ".yml", ".json")):
        return device.split(",") if device and "," in device else device
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


@stoppable("members were being loaded, and nothing is changed")
def load_ensemble(members: list[str] | None, trust: str | None, weights: str | None, **settings: Any) -> Ensemble:
    """Load with progress on stderr, and without transformers' own chatter.

    Raises:
        InvalidInputError, CheckpointError, VocabularyMismatchError, UnsupportedHeadError: as ``Ensemble``.
    """
    with status("loading softmeet"):
        from transformers.utils import logging

        from softmeet.ensemble import Ensemble
        from softmeet.members import zoo

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    given = numbers("--weights", weights)
    if "device" in settings:
        settings["device"] = placement(settings["device"])
    with err.status("loading") as progress:
        return Ensemble.from_pretrained(
            members[0] if members and len(members) == 1 else members or [zoo.DEFAULT],
            trust=numbers("--trust", trust),
            weights=[given] if isinstance(given, float) else given,
            on_progress=lambda name: progress.update(f"loading {escape(short(name))}"),
            **settings,
        )


def say(sentence: str) -> None:
    """A notice on stderr."""
    err.print(sentence, style="yellow", highlight=False, soft_wrap=True, markup=False)


def status(message: str) -> AbstractContextManager[Any]:
    """A spinner on stderr, if it is a terminal."""
    return err.status(message)
