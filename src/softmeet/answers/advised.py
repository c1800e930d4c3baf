"""Right answers beside bits: how members alone, and what is advised, answer a file of questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from softmeet.answers.asking import Answered, Asker, Writing, ask_all
from softmeet.answers.questions import TOKENS, Form, Question
from softmeet.answers.results import figures
from softmeet.ensemble import Ensemble
from softmeet.evaluation.advise import Advice
from softmeet.evaluation.candidates import Begin
from softmeet.evaluation.documents import Document
from softmeet.rules.values import POOLS

# The name of what is advised.
ADVISED = "what is advised"


def documents_of(questions: Sequence[Question], form: Form) -> list[Document]:
    """Return each question with its right answer as a document, on which members can be compared in bits."""
    return [Document(one.id, form.with_answer(one)) for one in questions]


def right_answers(
    advice: Advice, questions: Sequence[Question], form: Form, loading: Mapping[str, Any], begin: Begin
) -> dict[str, Any]:
    """Ask every member in its own tokens, what is advised, and the models in place of all; return the figures.

    Args:
        advice: on the members.
        questions: the questions.
        form: how they are put.
        loading: keyword arguments of ``Ensemble.from_pretrained`` for one model.
        begin: begins a piece of work on the terminal.
    """
    members, others = advice.judged.ensemble.names, [own.name for own in advice.alternatives]
    load = {name: partial(Ensemble.from_pretrained, [name], POOLS[0], **loading) for name in [*members, *others]}
    who: dict[str, Callable[[], Ensemble]] = dict(load)
    if advice.verdict != "single":
        who[ADVISED] = lambda: advice.ensemble
    way, found = Writing(TOKENS.get(form.how, 0)), dict[str, list[Answered]]()
    for name, loaded in who.items():
        advance = begin(f"asking {name}", 0, len(questions))
        found[name] = ask_all(
            lambda loaded=loaded: Asker(loaded(), form, way), questions, way.batch, {},  # type: ignore[misc]
            lambda batch, advance=advance: advance(len(batch)),  # type: ignore[misc]
        )  # fmt: skip
    return figures(members, found) | {"how": form.how}
