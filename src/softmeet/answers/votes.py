"""The majority of several answers: what one member can do with the time that an ensemble takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from softmeet.answers import extract
from softmeet.answers.asking import Answered
from softmeet.answers.questions import Question

# Ways to answer of which several answers can say the same.
VOTED = ("number", "choice", "match")


def said(how: str, text: str, question: Question) -> str | None:
    """Return what an answer in words says, in one form for all that say the same; None if it says nothing.

    Example:
        >>> said("number", "so it is 15.0", Question("1", "?", ("15",)))
        '15'
    """
    if how == "number":
        found = extract.number(text)
        return None if found is None else f"{found.normalize():f}"
    if how == "choice":
        return extract.letter(text, len(question.choices))
    return extract.tidy(text.strip().partition("\n")[0]) or None


def majority(how: str, questions: Sequence[Question], rounds: Sequence[Sequence[Answered]]) -> list[Answered]:
    """Return for each question the first of those answers that say what most of them say.

    Answers that say nothing have no vote; of equals what was said first wins. Seconds and tokens are those of all.

    Args:
        how: the way to answer, one of ``VOTED``.
        questions: the questions.
        rounds: in each round an answer to each question.
    """
    found = list[Answered]()
    for question, *answers in zip(questions, *rounds, strict=True):
        each = [said(how, one.answer, question) for one in answers]
        votes = Counter(word for word in each if word is not None)
        chosen = each.index(votes.most_common(1)[0][0]) if votes else 0
        one = answers[chosen]
        seconds, tokens = sum(own.seconds for own in answers), sum(own.tokens for own in answers)
        found.append(Answered(one.id, one.answer, one.right, seconds, tokens))
    return found
