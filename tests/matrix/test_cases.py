"""The table of cases has every pair of values that goes together; those that do not are refused by name."""

import re
from pathlib import Path

import golden
import pytest
import roads
from cases import AXES, CASES, COMMAND, PYTHON, REFUSALS, SERVER, can, legal
from roads import Asked

from update_golden import noted

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def test_the_table_has_every_pair_in_python_and_on_the_server_and_every_value_on_the_command_line():
    for road in (PYTHON, SERVER):
        wanted = set().union(*(case.pairs() for case in legal() if can(case, road)))
        assert sorted(wanted.difference(*(case.pairs() for case in CASES if can(case, road)))) == []
    values = {(axis, own) for axis, every in AXES.items() for own in every} - {
        ("sampling", "biased"),
        ("sampling", "torch"),
    }
    assert sorted(values.difference(*(set(case.named()) for case in CASES if can(case, COMMAND)))) == []
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("refusal", "case"),
    [pytest.param(refusal, case, id=f"{case}, {k}") for k, refusal in enumerate(REFUSALS) for case in refusal.cases()],
)
def test_what_does_not_go_together_is_refused_by_name(worlds, servers, refusal, case):
    asked = Asked(worlds[case.vocabulary], case, 1)
    if PYTHON in refusal.roads:
        with pytest.raises(refusal.error, match=refusal.match):
            roads.generate(asked)
    if COMMAND in refusal.roads:
        done = roads.command(asked, asked.prompts[0])
        assert done.exit_code
        assert re.search(refusal.match, str(done.exception))
    if SERVER in refusal.roads:
        answer = servers.post(asked, "completions", roads.body(asked) | {"prompt": asked.prompts[0]})
        assert answer.status_code == 400
        assert re.search(refusal.match, answer.json()["error"]["message"])


def test_golden_texts_change_for_a_reason_alone():
    assert set(golden.texts()) == {str(case) for case in CASES}
    assert f"Golden texts {golden.digest()}: " in CHANGELOG.read_text(encoding="utf-8"), (
        "python tools/update_golden.py --because REASON writes the golden texts anew, and this line of the changelog"
    )


def test_the_changelog_has_one_line_of_golden_texts_a_version():
    """Which the next reason replaces, until there is another version."""
    before = "# C\n\n## Unreleased\n\n### Changed\n\n- b\n\n## 0.1.0\n\n### Changed\n\n- Golden texts 00: old\n"
    first = noted(before, "1f", "new noise")
    assert first == before.replace("- b", "- Golden texts 1f: new noise\n- b")
    assert noted(first, "2f", "new covers") == first.replace("1f: new noise", "2f: new covers")
