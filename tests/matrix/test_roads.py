"""One text on every road: each case of the matrix, in Python, by the command and on the server, is its golden text."""

from __future__ import annotations

from functools import lru_cache

import golden
import pytest
import roads
from cases import AXES, CASES, COMMAND, PYTHON, SERVER, can
from roads import Asked

SAYS = {road: [case for case in CASES if can(case, road)] for road in (PYTHON, COMMAND, SERVER)}
# Of the cases of tiny members every third, which is tried in the shipped precision.
SHIPPED = [case for case in CASES if case.vocabulary in AXES["vocabulary"] and can(case, PYTHON)][::3]


def near(log_probs, asked, *, kept=False):
    """Return log-probabilities to compare with.

    In double precision they agree to 1e-9, in single precision to 1e-6 or the last two digits; but a rule that has a
    solver then makes more of what is rounded, and agrees to its tolerance.

    Args:
        log_probs: in nats.
        asked: the case.
        kept: whether they are compared with what was kept in six digits, or by transformers in single precision.
    """
    settings = asked.ensemble.model.settings
    if asked.world.dtype == "float64":
        return pytest.approx(log_probs, abs=1e-6 if kept else 1e-9, rel=2.5e-7 if kept else 0)
    return pytest.approx(log_probs, abs=1e-6 if settings.rule.is_average else settings.tol, rel=2.5e-7)


@lru_cache
def exactly(asked: Asked, tokens):
    """Return the log-probabilities of a text's tokens, which are read one by one."""
    return roads.read_one_by_one(asked, list(tokens))


def differences(asked: Asked, known, found):
    """Return what roads wrote that is not the golden text, or not by its tokens."""
    expected = {"texts": known["text"], "tokens": known["tokens"], "spelled": roads.spell(asked, known["tokens"])}
    wrong = []
    for road, written in found.items():
        six = [known["text"], *known["six"]][: len(written.texts)]
        if written.texts != six:
            wrong.append((road, written.texts, six))
        told = {what: getattr(written, what) for what in ("tokens", "spelled")}
        wrong += [(road, own, expected[what]) for what, own in told.items() if own not in (None, expected[what])]
    return wrong


@pytest.mark.parametrize("case", SAYS[PYTHON], ids=str)
def test_python(worlds, known, case):
    known, asked = known[str(case)], golden.asked(worlds, case, known)
    found = {"generate": roads.generate(asked), "stream": roads.stream(asked), "model": roads.transformers(asked)}
    if case.sampling != "torch":  # whose draws depend on where a text stands
        found["together"] = roads.together(asked)
        # Structures, penalties and tokens of bytes begin anew with every call.
        anew = case.structure != "none" or case.sampling == "biased" or case.vocabulary == "mixed"
        if not anew and (case.vocabulary != "bytes" or case.unit == "bytes"):
            found["resumed"] = roads.resumed(asked)
    assert differences(asked, known, found) == []
    exact = exactly(asked, tuple(known["tokens"]))
    assert exact[: len(known["log_probs"])] == near(known["log_probs"], asked, kept=True)
    assert found["model"].log_probs == near(exact, asked, kept=True)
    if "resumed" in found:
        assert found["resumed"].log_probs == near(exact, asked, kept=True)
    chat = Asked(asked.world, case, asked.seed, chat=True)
    assert roads.generate(chat).texts == [known["chat"]]


@pytest.mark.parametrize("case", SAYS[COMMAND], ids=str)
def test_the_command(worlds, known, case):
    known, asked = known[str(case)], golden.asked(worlds, case, known)
    assert differences(asked, known, {"printed": roads.printed(asked)}) == []
    if case.speculation == "default":
        assert roads.printed(Asked(asked.world, case, asked.seed, chat=True)).texts == [known["chat"]]
    else:
        assert differences(asked, known, {"together": roads.printed_together(asked)}) == []


@pytest.mark.parametrize("case", SAYS[SERVER], ids=str)
def test_the_server(worlds, servers, known, case):
    known, asked = known[str(case)], golden.asked(worlds, case, known)
    ways = roads.served, roads.served_stream, roads.listed_stream, roads.served_together
    found = {way.__name__: way(servers, asked) for way in ways}
    assert differences(asked, known, found) == []
    told = found["listed_stream"].log_probs
    assert told[: len(known["log_probs"])] == near(known["log_probs"], asked, kept=True)
    if can(case, PYTHON):
        assert told == near(exactly(asked, tuple(known["tokens"])), asked)
    chats = {"chat": roads.chat(servers, asked)}
    if case.speculation == "default":
        chats |= {"chat_stream": roads.chat_stream(servers, asked), "response": roads.response(servers, asked)}
    assert {name: own.texts for name, own in chats.items()} == {name: [known["chat"]] for name in chats}


ALIKE = [[case for case in SAYS[SERVER] if case.speculation == own] for own in AXES["speculation"]]
SIXES = [alike[start : start + 6] for alike in ALIKE for start in range(0, len(alike), 6)]


@pytest.mark.parametrize("six", SIXES, ids=lambda six: f"speculation={six[0].speculation}")
def test_the_server_in_company(worlds, servers, known, six):
    every = [golden.asked(worlds, case, known) for case in six]
    assert roads.in_company(servers, every) == [known[str(case)]["text"] for case in six]


@pytest.mark.parametrize("case", SHIPPED, ids=str)
def test_in_single_precision(single, single_servers, known, case):
    known, asked = known[str(case)], golden.asked(single, case, known)
    found = {"model": roads.transformers(asked)}
    found |= {"listed": roads.listed(single_servers, asked)} if can(case, SERVER) else {}
    assert differences(asked, known, found) == []
    exact = exactly(asked, tuple(known["tokens"]))
    for written in found.values():
        assert written.log_probs == near(exact, asked, kept=True)


@pytest.mark.parametrize("vocabulary", AXES["vocabulary"])
def test_a_known_text_is_read_as_it_is_written(worlds, servers, known, vocabulary):
    for case in [case for case in CASES if case.vocabulary == vocabulary]:
        asked, tokens = golden.asked(worlds, case, known), known[str(case)]["tokens"]
        exact = exactly(asked, tuple(tokens))
        if can(case, PYTHON):
            assert roads.read_at_once(asked, tokens) == near(exact, asked)
        if can(case, SERVER):
            found = roads.scored(servers, asked, tokens)
            assert found == near(exact[: len(found)], asked)
