"""A conversation at a terminal, and what can be changed while it lasts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from softmeet.cli import options
from softmeet.cli.conversation import Conversation, Piece
from softmeet.cli.flags import at_least_one, optional
from softmeet.cli.messages import say
from softmeet.cli.progress import reading
from softmeet.cli.sampling import SamplingFlags
from softmeet.cli.tables import out
from softmeet.cli.terminal import harmless, write
from softmeet.cli.typed import CtrlC
from softmeet.engine import ANSWER_TOKENS
from softmeet.errors import InvalidInputError, SoftmeetError
from softmeet.suspended import StoppedError

if TYPE_CHECKING:
    from softmeet.ensemble import Ensemble

_HELP = """\
/set temperature X, /set seed N, /set weights 0.3,0.7  how answers are drawn, and who counts how much
/set system TEXT  begin anew, with this as the system's message; without TEXT, without one
/show             what is set
/colors           colour text by the model that finds it likelier than the others do, or no more
/regenerate       answer the last question anew, with a seed by the next one
/save FILE        write what was said, as JSON if FILE ends in .json
/clear            forget what was said
/bye              end; so do /quit, exit and Ctrl-D
\"""               begins and ends a text of several lines; a paste is one text
Ctrl-C ends an answer."""
# The colours of members, in order, by --colors; and how much likelier than all others, in nats, a coloured member finds
# a text.
COLORS, _LIKELIER = ("cyan", "magenta", "yellow", "green", "blue", "red"), math.log(1.25)


class TalkFlags(SamplingFlags, panel="Sampling"):
    """Flags for how answers are drawn: cooler than other texts, as chats are elsewhere."""

    max_new_tokens: int | None = at_least_one("The most tokens of an answer.", shown=str(ANSWER_TOKENS))
    temperature: float | None = optional("Higher is more random; 0 always takes the likeliest.", min=0, shown="0.7")

    def arguments(self) -> dict[str, Any]:
        """Return the flags as keyword arguments of ``Ensemble.stream``."""
        cool = self.temperature is None and self.do_sample and not self.one_member
        from softmeet.hf.chat import TEMPERATURE

        return super().arguments() | ({"temperature": TEMPERATURE} if cool else {})


class Talk:
    """A conversation at a terminal, with what can be changed while it lasts.

    Args:
        ensemble: who answers.
        sampling: how answers are drawn.
        system: the system's message; None for none.
        ctrl_c: is told when an answer is written.
        sources: whether it is said where stretches of an answer stand in files.
    """

    def __init__(
        self, ensemble: Ensemble, sampling: TalkFlags, system: str | None, ctrl_c: CtrlC, *, sources: bool = False
    ) -> None:
        self._sources = sources
        self._ensemble, self._sampling, self._ctrl_c = ensemble, sampling, ctrl_c
        self._weights: Any = None
        self._colored = False
        self._said = Conversation(
            self._written, system,
            lambda count: say(f"the first {count} turns no longer fit into a member's context, and are forgotten"),
        )  # fmt: skip

    def answer(self, text: str) -> None:
        """Print an answer as it comes; Ctrl-C ends it, and what was said counts."""
        console = out()
        with reading() as own, self._ctrl_c.stops(own), own.over():
            try:
                for piece, log_probs in self._said.answer(text):
                    write(console, piece, color_of(log_probs))
            except StoppedError:
                pass
            except SoftmeetError as error:
                say(str(error))
        console.print()
        if self._sources and self._said.turns[-1:] and self._said.turns[-1]["role"] == "assistant":
            self._say_sources(self._said.turns[-1]["content"])

    def _say_sources(self, answer: str) -> None:
        """Say where stretches of an answer stand in files, and how many symbols each has."""
        for reader in self._ensemble.model.claimants:
            for one in reader.sources(answer):
                say(str(one))

    def _written(self, turns: Any) -> Iterator[Piece]:
        """Stream an answer to turns, with what each member makes of it where colours are asked for."""
        ensemble, arguments = self._ensemble, self._sampling.arguments()
        if self._weights is not None:
            arguments["weights"] = self._weights
        if not self._colored:
            yield from ((piece, []) for piece in ensemble.stream(turns, **arguments))
            return
        from softmeet.hf.streaming import by_member

        told = by_member(ensemble.model, ensemble.tokenizer, turns, **arguments)
        yield from ((piece, log_probs) for piece, _, log_probs in told)

    def obey(self, text: str) -> bool:
        """Do what a text says that begins with a slash; return whether it was such a one."""
        word, _, rest = text.partition(" ")
        if not (word.startswith("/") and (word[1:].isalpha() or word == "/?")):
            return False
        command = getattr(self, f"do_{word[1:].replace('?', 'help')}", None)
        if command is None:
            say(f"there is no {word}: /help lists what there is")
            return True
        try:
            command(rest.strip())
        except SoftmeetError as error:
            say(str(error))
        return True

    def do_help(self, _: str) -> None:
        """Say what can be typed."""
        say(_HELP)

    def do_set(self, text: str) -> None:
        """Change a setting by its name; without a value, back to the default."""
        name, _, value = text.partition(" ")
        value = value.strip()
        if name == "system":
            self.do_system(value)
            return
        if name not in ("temperature", "seed", "weights"):
            raise InvalidInputError(f"expected /set temperature, seed, weights or system, got {text or 'nothing'}")
        numbers = _numbers(value, whole=name == "seed")
        if name == "weights":
            settings, count = self._ensemble.model.config.settings, len(self._ensemble.names)
            if len(numbers) not in (0, count):
                raise InvalidInputError(f"expected {count} weights with commas between, got {value}")
            self._weights = settings.changed(weights=numbers).weights if numbers else None
        elif len(numbers) > 1:
            raise InvalidInputError(f"expected one number, got {value}")
        elif name == "seed":
            self._sampling.seed = numbers[0] if numbers else None
        else:
            self._sampling.temperature, self._sampling.do_sample = numbers[0] if numbers else None, True
        self.do_show()

    def do_system(self, system: str) -> None:
        """Begin anew with a message of the system, or without one."""
        self._said.begin(system or None)
        say(f"begun anew, with{' this' if system else 'out a'} system message")

    def do_show(self, _: str = "") -> None:
        """Print the models, how answers are drawn, and the system's message."""
        config, sampling = self._ensemble.model.config, self._sampling.arguments()
        weights = self._weights or config.weights
        models = (f"{options.short(name)} {weight:.2f}" for name, weight in zip(config.members, weights, strict=True))
        how = f"temperature {sampling['temperature']:g}" if sampling.get("temperature") else "always the likeliest"
        most = " or ".join(
            f"{sampling[name]} {unit}"
            for name, unit in {"max_new_tokens": "tokens", "max_bytes": "bytes"}.items()
            if name in sampling
        )
        say(f"models: {', '.join(models)}, mixed by {config.rule} over {config.vocabulary}")
        say(f"drawn: {how}, seed {sampling.get('seed', 'none')}, at most {most} an answer")
        for turn in self._said.turns[:1]:
            if turn["role"] == "system":
                say(f"system: {turn['content']}")

    def do_colors(self, _: str = "") -> None:
        """Begin to colour text, and say by which colour of which model; or leave it off."""
        if self._sampling.one_member:
            raise InvalidInputError("colours need what all members say: leave out --one-member")
        self._colored = not self._colored
        if self._colored:
            names = zip(COLORS, self._ensemble.names, strict=False)
            out().print(Text.assemble(*((f"{harmless(options.short(name))}  ", color) for color, name in names)))
        else:
            say("text is coloured no more")

    def do_regenerate(self, _: str) -> None:
        """Answer the last question anew."""
        if (text := self._said.take_back()) is None:
            raise InvalidInputError("nothing was asked yet")
        if self._sampling.seed is not None:
            self._sampling.seed += 1
        self.answer(text)

    def do_save(self, name: str) -> None:
        """Write what was said to a new file."""
        if not name:
            raise InvalidInputError("expected the name of a file, as in /save talk.md")
        path, turns = Path(name).expanduser(), self._said.turns
        plain = "".join(f"{turn['role']}:\n{turn['content']}\n\n" for turn in turns)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(turns, ensure_ascii=False, indent=2) if path.suffix == ".json" else plain)
        except OSError as error:
            raise InvalidInputError(f"cannot write {name}: {error.strerror}") from None
        say(f"wrote {path}")

    def do_clear(self, _: str) -> None:
        """Forget all turns but the system's message."""
        self._said.clear()
        say("what was said is forgotten")


def _numbers(text: str, *, whole: bool) -> list[Any]:
    """Return the numbers of a text with commas between, maybe none, or raise InvalidInputError."""
    try:
        found = [int(part) if whole else float(part) for part in text.split(",") if text]
    except ValueError:
        found = [-1]
    if not all(0 <= number < math.inf for number in found):
        raise InvalidInputError(f"expected a {'whole number' if whole else 'number'} of 0 or more, got {text}")
    return found


def color_of(log_probs: list[float]) -> str:
    """Return the colour of the member that finds a text likelier than all others do; none where they are about equal.

    Weights play no part, by which else the heaviest member would colour all.

    Args:
        log_probs: each member's log-probability of the text, in nats; NaN of a member that did not run.

    Example:
        >>> color_of([-1.0, -3.0]), color_of([-3.0, -1.0]), color_of([-1.0, -1.1])
        ('cyan', 'magenta', '')
    """
    known = sorted(((own, k) for k, own in enumerate(log_probs) if own > -math.inf), reverse=True)
    if len(known) < len(log_probs) or len(known) < 2 or known[0][0] - known[1][0] < _LIKELIER:
        return ""
    return COLORS[known[0][1] % len(COLORS)]
