"""One text on every road: each case of the matrix, on the server and in the shipped precision, is its golden text."""

import golden
import pytest
import roads
from agreeing import SAYS, differences, exactly, near, some
from cases import AXES, CASES, PYTHON, SERVER, can

# Of the cases of tiny members every sixth, which is tried in the shipped precision.
SHIPPED = some([case for case in CASES if case.vocabulary in AXES["vocabulary"] and can(case, PYTHON)], 6)
# Every case is a completion and a stream with log-probabilities; a stream without is the same one, six texts in one
# request are rows of the batch as those of several are, and conversations are had by one of three endpoints each.
STREAMED, TOGETHER = some(SAYS[SERVER], 6, 1), some(SAYS[SERVER], 4)
CHATS = {name: some(SAYS[SERVER], 3, k) for k, name in enumerate(("chat", "chat_stream", "response"))}


@pytest.mark.parametrize("case", SAYS[SERVER], ids=str)
def test_the_server(worlds, servers, known, case):
    known, asked = known[str(case)], golden.asked(worlds, case, known)
    found = {"served": roads.served(servers, asked), "listed_stream": roads.listed_stream(servers, asked)}
    ways = {"served_stream": STREAMED, "served_together": TOGETHER}
    found |= {name: getattr(roads, name)(servers, asked) for name, own in ways.items() if case in own}
    assert differences(asked, known, found) == []
    told = found["listed_stream"].log_probs
    assert told[: len(known["log_probs"])] == near(known["log_probs"], asked, kept=True)
    if can(case, PYTHON):
        assert told == near(exactly(asked, tuple(known["tokens"])), asked)
    chats = {name: getattr(roads, name)(servers, asked).texts for name, own in CHATS.items() if case in own}
    assert chats == {name: [known["chat"]] for name in chats}


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
            # To whom it is a prompt, a text that was drawn was given.
            exact = exact if case.files == "none" else roads.read_at_once(asked, tokens, drawn=False)
            assert found == near(exact[: len(found)], asked)
