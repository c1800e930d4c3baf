"""A conversation as a prompt: each member's chat template, the text form in which it was trained to be talked to."""

from __future__ import annotations

import ctypes
import faulthandler
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError

if TYPE_CHECKING:
    from softmeet.hf.protocol import AnyEnsemble

# Each turn on a line of its own, behind its role: what a model without a template may make something of.
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
Messages = Sequence[Mapping[str, Any]]
# Functions that an answer may call, each as OpenAI's API has it.
Tools = Sequence[Mapping[str, Any]]
# At which temperature a conversation is answered unless it is said otherwise: at 1 small models babble.
TEMPERATURE = 0.7
# The most seconds that a template may take: it is a program that comes with a model.
_SECONDS = 10.0
# The most characters that it may add to a conversation, and how often it may repeat what is said there.
_LONGER, _TIMES = 1_000_000, 10


def is_chat(given: object) -> bool:
    """Return whether something is a conversation, a list of turns, and not a text or a list of texts."""
    return isinstance(given, Sequence) and bool(given) and isinstance(given[0], Mapping)


# When the process ends, for each context that is entered; by a key of its own.
_ends = dict[object, float]()
_ends_lock = threading.Lock()


class TookTooLongError(Exception):
    """The error that ends code in this thread whose time is over."""

    def __str__(self) -> str:
        """Return what happened."""
        return "it takes too long"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLongError` in this thread once a context has taken so many seconds.

    Code of Python is ended between two of its steps. Within a single one, such as the power of a large number, nothing
    but the process can be ended: it is once twice the time is over, as all its threads may be waiting for that step.
    What they do is then written to the standard error output.

    Example:
        >>> with limited(10):
        ...     sum(range(10))
        45
    """
    own, lock, over = threading.get_ident(), threading.Lock(), threading.Event()

    def end() -> None:
        with lock:
            if not over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(own), ctypes.py_object(TookTooLongError))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    _end_process(over, time.monotonic() + 2 * seconds)
    try:
        try:
            yield
        finally:
            with lock:
                over.set()
            timer.cancel()
    finally:  # even if the error above comes while the context is left
        _end_process(over, None)


def _end_process(key: object, when: float | None) -> None:
    """End the process at a time of the monotonic clock unless it is told None for the same key before."""
    with _ends_lock:
        _ends.pop(key, None)
        if when is not None:
            _ends[key] = when
        if _ends:
            left = max(round(min(_ends.values()) - time.monotonic(), 2), 0.01)
            faulthandler.dump_traceback_later(left, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of an ensemble's members.

    Attributes:
        names: the members' names.
        tokenizers: the members' tokenizers, in the same order; those of instruct models have a template.
        plain: whether members without a template take :data:`PLAIN`.
    """

    names: Sequence[str]
    tokenizers: Sequence[PreTrainedTokenizerBase]
    plain: bool = False

    def of(self, chosen: Sequence[int]) -> ChatTemplates:
        """Return those of the members numbered ``chosen``."""
        return replace(self, names=[self.names[k] for k in chosen], tokenizers=[self.tokenizers[k] for k in chosen])

    @property
    def missing(self) -> list[str]:
        """The names of the members that have no template, and take none."""
        if self.plain:
            return []
        return [name for name, own in zip(self.names, self.tokenizers, strict=True) if not own.chat_template]

    @property
    def plainly(self) -> list[str]:
        """The names of the members that are told a conversation by :data:`PLAIN`."""
        return [
            name
            for name, own in zip(self.names, self.tokenizers, strict=True)
            if own.chat_template == PLAIN or (self.plain and not own.chat_template)
        ]

    @property
    def without_tools(self) -> list[str]:
        """The names of the members whose templates do not tell which functions an answer may call."""
        return [
            name
            for name, own in zip(self.names, self.tokenizers, strict=True)
            if (own.chat_template and "tools" not in own.get_chat_template(tools=[]))
            or (self.plain and not own.chat_template)
        ]

    def own_prompts(self, conversations: Sequence[Messages], tools: Tools | None = None) -> list[list[int]]:
        r"""Render a conversation for each member by its own template, up to where the answer begins.

        Args:
            conversations: for each member what it is told: each turn's ``role``, such as system, user or assistant, and
                ``content``, a text. An assistant's last turn with ``prefix`` true is gone on with.
            tools: the functions that an answer may call, for templates that tell of them.

        Returns:
            for each member the ids of its own tokens.

        Raises:
            InvalidInputError: if a member has no template, or a template refuses the messages.

        Example:
            >>> from transformers import AutoTokenizer
            >>> from softmeet.members import zoo
            >>> tokenizer = AutoTokenizer.from_pretrained(zoo.locate("wide/gpt2"))
            >>> chat = ChatTemplates(["wide/gpt2"], [tokenizer], plain=True)
            >>> tokenizer.decode(chat.own_prompts([[{"role": "user", "content": "Who are you?"}]])[0])
            'user: Who are you?\nassistant:'
        """
        if self.missing:
            raise InvalidInputError(
                f"{', '.join(self.missing)} {'has' if len(self.missing) == 1 else 'have'} no chat template, so there "
                "is no saying how to chat: ask for the plain one (--plain-chat, or softmeet.hf.chat.take_plain), or "
                "continue a text"
            )
        return [
            self._rendered(own, messages, tools) for own, messages in zip(self.tokenizers, conversations, strict=True)
        ]

    def shared_prompt(self, messages: Messages, tools: Tools | None = None) -> list[int] | None:
        """Render a conversation as tokens that all members read; None if the members' templates make different ones.

        Members without a template, unless all lack one, read what the others' templates make.

        Raises:
            InvalidInputError: if a template refuses the messages; or for the reason of :meth:`own_prompts` if no member
                has a template.
        """
        able = [own for own in self.tokenizers if own.chat_template]
        if not able:
            return self.own_prompts([messages] * len(self.tokenizers), tools)[0]
        first, *others = [self._rendered(own, messages, tools) for own in able]
        return None if any(other != first for other in others) else first

    def _rendered(self, tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None) -> list[int]:
        try:
            with limited(_SECONDS):
                goes_on = bool(messages[-1].get("prefix"))
                text: str = tokenizer.apply_chat_template(
                    [{name: own for name, own in message.items() if name != "prefix"} for message in messages],
                    tools=[dict(tool) for tool in tools] if tools else None,
                    chat_template=None if tokenizer.chat_template else PLAIN,
                    add_generation_prompt=not goes_on,
                    continue_final_message=goes_on,
                    tokenize=False,
                )
            if len(text) > _LONGER + _TIMES * sum(len(str(told)) for told in (*messages, *(tools or ()))):
                raise ValueError(f"it makes {len(text):,} characters of them")
            found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # it may divide by zero, or never end
            why = str(error) or type(error).__name__
            raise InvalidInputError(f"the chat template refuses these messages: {why}"[:300]) from error
        return list(found)


def chat_of(model: AnyEnsemble) -> ChatTemplates:
    """Return the chat templates of a model's members; of one made in memory, that of its tokenizer for all members."""
    found = getattr(model, "chat", None)
    names = model.config.members
    return found if isinstance(found, ChatTemplates) else ChatTemplates(names, [model.tokenizer] * len(names))


def take_plain(model: AnyEnsemble) -> None:
    """Let the members of a model that have no chat template take :data:`PLAIN`."""
    model.chat = replace(chat_of(model), plain=True)
