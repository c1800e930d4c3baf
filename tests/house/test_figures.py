"""What pages show of measurements is what benchmarks left in benchmarks/results, and each result names its command."""

from __future__ import annotations

import json

import pytest

import report
from update_figures import PAGES, RESULTS, ROOT, FigureError, main, read, sentences, updated

ROWS = [
    {"rule": "meet", "trust": 0.3, "calls": 364.6, "closed": 0.31, "each": [1.5, 2], "large": 1153.0, "small": 3.21e-8},
    {"rule": "meet", "trust": 1.0, "calls": None, "closed": "refused", "each": [3]},
]
RESULT = {
    "title": "t",
    "command": "python benchmarks/decode.py calls",
    "date": "2026-11-29",
    "machine": "m",
    "rows": ROWS,
}
FOUND = {"some": RESULT, "other-one": RESULT | {"command": "other", "facts": {"v": 0.24}}}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_shows_what_the_results_hold(page):
    text = page.read_text(encoding="utf-8")
    told = sentences().get(page.relative_to(ROOT).as_posix(), ())
    assert updated(text, read(), told) == text, "run: make figures"


def test_every_result_is_read():
    assert len(read()) == len([*RESULTS.glob("*.json")]) > 0


@pytest.mark.parametrize(
    ("what", "figure"),
    [
        ("some[meet; trust=0.3].calls:.0f", "365"),
        ("some[trust=1].closed:.0%", "refused"),
        ("some[trust=0.3].closed:.0%", "31 %"),
        ("some[trust=0.3].each:.2f", "1.50, 2.00"),
        ("some[trust=0.3].rule:code", "`meet`"),
        ("some[trust=0.3].large:.3g", "1,150"),
        ("some[trust=0.3].large:#,.4g", "1,153"),
        ("some[trust=0.3].trust:#.2g", "0.30"),
        ("some[trust=0.3].small:.2g", "3.2·10⁻⁸"),
        ("some.date", "2026-11-29"),
        ("other-one.facts.v:.1f", "0.2"),
    ],
)
def test_a_sentence_is_filled(what, figure):
    told = [f"takes {{{what}}} of them, *and* {{{what}}}."]
    page = updated("$x^{0.5}$. It takes 17 of them, *and* 1,234 (5 %).", FOUND, told)
    assert page == f"$x^{{0.5}}$. It takes {figure} of them, *and* {figure}."
    assert updated(page, FOUND, told) == page


def test_a_table_is_filled_and_says_by_which_commands():
    opening = "\n<!-- figures: some + other-one[trust=1]\n| {rule:code} | {calls:.0f} ({trust}) | {closed:.0%} | -->\n"
    head = "| rule | calls | closed |\n|---|---|---|\n"
    rows = ["| `meet` | 365 (0.3) | 31 % |\n", *["| `meet` | | refused |\n"] * 2]
    origin = "\n2026-11-29, m:\n\n- `python benchmarks/decode.py calls`\n- `other`\n<!-- end -->\n"
    made = "".join([opening, head, *rows, origin])
    assert updated(f"{opening}{head}| old | 3 |\n<!-- end -->\n", FOUND) == made
    assert updated(made, FOUND) == made


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("som[trust=1].calls", "nothing is named 'som'; did you mean 'some'?"),
        ("some[trust=1].call", "nothing is named 'call'; did you mean 'calls'?"),
        ("some[meet].calls", "2 rows fit 'some[meet]', expected one"),
        ("some[trust=7].calls", "no row of some has trust=7; columns are rule, trust, calls"),
        ("some[trust=1].calls:.0f", "None cannot be written as '.0f'"),
    ],
)
def test_what_is_wrong_with_a_figure_is_said(what, told):
    with pytest.raises(FigureError) as raised:
        updated("It takes 3 s.", FOUND, [f"takes {{{what}}} s"])
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("It took {some.date} s.", "stands there 0 times, expected once: reword it in figures.yml"),
        ("takes {some.date} s", "stands there 2 times"),
        ("{some.date} s.", "between words of it"),
        ("It takes 3 s.", "between words of it"),
        ("It takes {some[trust=1]} s.", "between words of it"),
    ],
)
def test_what_is_wrong_with_a_sentence_is_said(sentence, told):
    with pytest.raises(FigureError) as raised:
        updated("It takes 3 s. That takes 4 s.", FOUND, [sentence])
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("<!-- figures: some\n| {rule} | -->\n| rule |\n|---|\n", "line 1: expected <!-- figures: NAME, a line"),
        ("<!-- figures: some\n| {rul} | -->\n| rule |\n|---|\n<!-- end -->", "nothing is named 'rul'"),
        ("<!-- figures: some\n| {rule} | -->\n| a | b |\n|---|---|\n<!-- end -->", "not as many cells as the header"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(page, told):
    with pytest.raises(FigureError) as raised:
        updated(page, FOUND)
    assert told in str(raised.value)


@pytest.mark.parametrize("field", ["command", "date", "machine", "rows"])
def test_a_result_without_its_command_date_or_machine_is_refused(tmp_path, field):
    (tmp_path / "some.json").write_text(json.dumps(RESULT | {field: ""}))
    with pytest.raises(FigureError, match=rf"some\.json lacks {field}"):
        read(tmp_path)


def test_a_result_by_a_benchmark_that_is_gone_is_refused(tmp_path):
    (tmp_path / "some.json").write_text(json.dumps(RESULT | {"command": "python benchmarks/gone.py"}))
    with pytest.raises(FigureError, match=r"some\.json is by benchmarks/gone\.py, which is no file"):
        read(tmp_path)


def test_check_writes_nothing(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("It takes 0 calls.")
    (tmp_path / "figures.yml").write_text("page.md:\n  - takes {calls[meet].functions} calls\n")
    monkeypatch.setattr("update_figures.PAGES", [page])
    monkeypatch.setattr("update_figures.ROOT", tmp_path)
    told = sentences(tmp_path / "figures.yml")
    monkeypatch.setattr("update_figures.sentences", lambda: told)
    monkeypatch.setattr("update_figures.read", lambda: {"calls": RESULT | {"rows": [{"rule": "meet", "functions": 7}]}})
    assert main(check=True) == 1
    assert "differs: page.md" in capsys.readouterr().out
    assert page.read_text() == "It takes 0 calls."
    assert main(check=False) == 0
    assert "python benchmarks/decode.py calls --json benchmarks/results/calls.json" in capsys.readouterr().out
    assert page.read_text() == "It takes 7 calls."
    assert main(check=True) == 0


def test_benchmarks_leave_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("QWEN05", "/models/q.gguf")
    script = f"{ROOT}/benchmarks/decode.py"
    monkeypatch.setattr(
        "sys.argv", [script, "calls", "-m", "/models/q.gguf", "-m=/other/b", "-t", "a b", "--json", "x.json"]
    )
    report.show("t", [{"rule": "meet", "ms": 1 / 3, "none": None}], tmp_path / "some.json", fits={"v": (2 / 3,)})
    found = read(tmp_path)["some"]
    assert found["command"] == "python benchmarks/decode.py calls -m QWEN05 -m=b -t 'a b'"
    assert found["rows"] == [{"rule": "meet", "ms": 0.333333, "none": None}]
    assert found["fits"] == {"v": [0.666667]}
    assert found["machine"] == report.machine()


def test_a_page_that_is_gone_is_named(tmp_path):
    (tmp_path / "figures.yml").write_text("docs/gone.md:\n  - takes {calls[meet].functions} calls\n")
    with pytest.raises(FigureError, match=r"figures\.yml names docs/gone\.md, which is no file"):
        sentences(tmp_path / "figures.yml")
