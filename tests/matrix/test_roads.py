"""One text on every road: each case of the matrix, in Python, by the command and on the server, is its golden text."""

from __future__ import annotations

import golden
import pytest
import roads
from cases import AXES, CASES, COMMAND, PYTHON, SERVER, can
from roads import Asked

SAYS = {road: [case for case in CASES if can(case, road)] for road in (PYTHON, COMMAND, SERVER)}
# The 41 tiny cases in the shipped precision: of every three one.
SHIPPED = [case for case in CASES if case.vocabulary in AXES["vocabulary"] and can(case, PYTHON)][::3]


def near(log_probs, asked=None):
    """Return log-probabilities to compare with: fp64 agrees to 1e-9, and fp32 to its last two digits or 1e-6.

    Args:
        log_probs: in nats.
        asked: the case, for its members' precision; None for what transformers keeps, which is fp32.
    """
    exact = asked is not None and asked.world.dtype == "float64"
    return pytest.approx(log_probs, abs=1e-9, rel=0) if exact else pytest.approx(log_probs, abs=1e-6, rel=2.5e-7)


def differences(asked: Asked, known, found):
    """Return what roads wrote that is not the golden text, or not by its tokens."""
    expected = {"texts": known["text"], "tokens": known["tokens"], "spelled": roads.spell(asked, known["tokens"])}
    wrong = []
    for road, written in found.items():
        six = [known["text"], *known["six"]][: len(written.texts)]
        if written.texts != six:
            wrong.append((road, written.texts, six))
        for what in ("tokens", "spelled"):
            if getattr(written, what) not in (None, expected[what]):
                wrong.append((road, getattr(written, what), expected[what]))
    return wrong


@pytest.mark.parametrize("case", SAYS[PYTHON], ids=str)
def test_python(worlds, known, case):
    known, asked = known[str(case)], golden.asked(worlds, case, known)
    found = {"generate": roads.generate(asked), "stream": roads.stream(asked), "model": roads.transformers(asked)}
    if case.sampling != "torch":  # whose draws depend on where a text stands
        found["together"] = roads.together(asked)
        if case.structure == "none" and case.sampling != "biased":  # which begin anew with every call
            found["resumed"] = roads.resumed(asked)
    assert differences(asked, known, found) == []
    exact = roads.read_one_by_one(asked, known["tokens"])
    assert exact[: len(known["log_probs"])] == near(known["log_probs"])
    assert found["model"].log_probs == near(exact)
    if "resumed" in found:
        assert found["resumed"].log_probs == near(exact)
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
    ways = roads.served, roads.served_stream, roads.listed, roads.listed_stream, roads.served_together
    found = {way.__name__: way(servers, asked) for way in ways}
    assert differences(asked, known, found) == []
    exact = found["listed"].log_probs
    assert exact[: len(known["log_probs"])] == near(known["log_probs"])
    assert found["listed_stream"].log_probs == near(exact, asked)
    if can(case, PYTHON):
        assert roads.read_one_by_one(asked, known["tokens"]) == near(exact, asked)
    chats = [way(servers, asked).texts for way in (roads.chat, roads.chat_stream, roads.response)]
    assert chats == [[known["chat"]]] * 3


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
    found |= {} if case.sampling == "torch" else {"together": roads.together(asked)}
    found |= {"listed": roads.listed(single_servers, asked)} if can(case, SERVER) else {}
    assert differences(asked, known, found) == []
    if case.rule != "max-entropy":  # whose solver makes more of what is rounded
        exact = roads.read_one_by_one(asked, known["tokens"])
        assert [own.log_probs for own in found.values() if own.log_probs] == [
            near(exact) for own in found.values() if own.log_probs
        ]


OVER_BYTES = pytest.param("bytes", marks=pytest.mark.xfail(reason="covers depend on the pieces that a text comes in"))


@pytest.mark.parametrize("vocabulary", ["tokens", OVER_BYTES, "symbols"])
def test_a_known_text_is_read_as_it_is_written(worlds, servers, known, vocabulary):
    for case in [case for case in CASES if case.vocabulary == vocabulary]:
        asked, tokens = golden.asked(worlds, case, known), known[str(case)]["tokens"]
        exact = roads.read_one_by_one(asked, tokens)
        if can(case, PYTHON):
            assert roads.read_at_once(asked, tokens) == near(exact, asked)
        if can(case, SERVER):
            assert roads.scored(servers, asked, tokens) == near(exact, asked)
