"""One text on every road: each case of the matrix, in Python and by the command, is its golden text."""

from __future__ import annotations

import golden
import pytest
import roads
from agreeing import SAYS, differences, exactly, near
from cases import COMMAND, PYTHON
from roads import Asked


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
