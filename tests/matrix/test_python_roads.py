"""One text on every road: each case of the matrix, in Python and by the command, is its golden text."""

from dataclasses import replace

import golden
import pytest
import roads
from agreeing import SAYS, differences, exactly, near, some
from cases import COMMAND, PYTHON

# Structures, penalties and tokens of bytes begin anew with every call: such texts are not resumed.
RESUMED = [
    case for case in SAYS[PYTHON]
    if case.sampling not in ("torch", "biased") and case.structure == "none" and case.vocabulary != "mixed"
    and case.files == "none"  # what one call has drawn was given to the next
    and (case.vocabulary != "bytes" or case.unit == "bytes")
]  # fmt: skip
# The draws of torch depend on where a text stands.
TOGETHER = some([case for case in SAYS[PYTHON] if case.sampling != "torch"], 5)
# Every case is written by the model's own generate, and by turns by the ensemble's, as a stream or as an answer in a
# conversation; the command is given a prompt as one, as a conversation or as one of six.
TEXTS, STREAMED, CHATS = (some(SAYS[PYTHON], 3, k) for k in range(3))
PRINTED = some(SAYS[COMMAND], 2)
PRINTED_CHATS = some([case for case in PRINTED if case.speculation == "default"], 2)
PRINTED_TOGETHER = [case for case in PRINTED if case.speculation != "default"][::2]


@pytest.mark.parametrize("case", SAYS[PYTHON], ids=str)
def test_python(worlds, known, case):
    known, asked = known[str(case)], golden.asked(worlds, case, known)
    found = {"model": roads.transformers(asked)}
    ways = {"generate": TEXTS, "stream": STREAMED, "together": TOGETHER, "resumed": RESUMED}
    found |= {name: getattr(roads, name)(asked) for name, own in ways.items() if case in own}
    assert differences(asked, known, found) == []
    exact = exactly(asked, tuple(known["tokens"]))
    assert exact[: len(known["log_probs"])] == near(known["log_probs"], asked, kept=True)
    assert found["model"].log_probs == near(exact, asked, kept=True)
    if "resumed" in found:
        assert found["resumed"].log_probs == near(exact, asked, kept=True)
    if case in CHATS:
        assert roads.generate(replace(asked, chat=True)).texts == [known["chat"]]


@pytest.mark.slow
@pytest.mark.parametrize("case", PRINTED, ids=str)
def test_the_command(worlds, known, case):
    known, asked = known[str(case)], golden.asked(worlds, case, known)
    assert differences(asked, known, {"printed": roads.printed(asked)}) == []
    if case in PRINTED_CHATS:
        assert roads.printed(replace(asked, chat=True)).texts == [known["chat"]]
    if case in PRINTED_TOGETHER:
        assert differences(asked, known, {"together": roads.printed_together(asked)}) == []
