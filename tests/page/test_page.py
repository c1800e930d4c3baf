"""The page at /ui in a real headless Chromium, and the pieces of HTML that it is made of.

Screenshots are kept in build/screenshots.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from browser import PATIENCE, needs_chromium
from playwright.sync_api import expect
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble
from typer.testing import CliRunner

from softmeet.server.security import Protection
from softmeet.server.ui_html import details_of, text_of

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
expect.set_options(timeout=PATIENCE)

# Gradio's own, in its thread.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")]

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def url(narrow):
    with running(serving_of({"default": narrow}, ui=True)) as found:
        yield found


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    page.set_default_timeout(PATIENCE)
    elsewhere, complaints = [], []
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.goto(f"{url}/ui")
    page.wait_for_selector("#go")
    yield page
    page.close()
    assert not elsewhere
    assert not [text for text in complaints if "404" not in text]


def holds(page, name, value):
    """Whether a slider holds ``value``, typed if it does not: its range mirrors that, whatever its box shows."""
    box, bar = (page.locator(f"#{name} input[type={kind}]") for kind in ("number", "range"))
    if (box.input_value(), bar.input_value()) != (value, value):
        box.fill(value)
        box.press("Tab")
        page.wait_for_timeout(500)
    return (box.input_value(), bar.input_value()) == (value, value)


def generate(page, prompt="And the king said unto his", tokens="14", temperature="0"):
    page.fill("#prompt textarea", prompt)
    if not page.locator("#length").is_visible():
        page.get_by_text("Sampling").click()
    # One that is set while the other still travels may be put back on a busy machine: both are looked at in the end.
    for _ in range(20):
        if all(holds(page, name, value) for name, value in (("length", tokens), ("temperature", temperature))):
            break
    assert holds(page, "length", tokens)
    assert holds(page, "temperature", temperature)
    page.click("#go")
    page.wait_for_selector("#left .tok")


def finished(page, side="left"):
    expect(page.locator(f"#{side} .cursor")).to_have_count(0, timeout=PATIENCE)
    return page.locator(f"#{side} .tok")


def choose(page, label, option):
    page.locator(f"#{label} input").fill(option)
    page.get_by_role("option", name=option).last.click()
    expect(page.locator(f"#{label} input")).to_have_value(option)


@needs_chromium
def test_type_stream_click_and_find_the_values_of_inspect(page):
    generate(page)
    tokens = finished(page)
    text = page.locator("#left .text").inner_text().replace("⏎", "")
    tokens.nth(3).click()
    page.wait_for_selector("#details .cards")
    page.screenshot(path=SHOTS / "page.png", full_page=True)
    from softmeet.cli.main import app

    done = CliRunner().invoke(app, ["inspect", text, "-m", "narrow", "--top", "8", "--json"])
    facts = json.loads(done.stdout[done.stdout.index("{") :])
    assert len(facts["tokens"]) == 5 + tokens.count(), "the text came back as other tokens: choose another prompt"
    expected = facts["tokens"][5 + 3]
    cards = page.locator("#details .card")
    assert cards.locator("h4").all_inner_texts() == ["ensemble", *facts["members"]]
    for card, rows in zip(cards.all(), [expected["top"], *expected["member_top"]], strict=True):
        found = [float(b.get_attribute("data-log-prob")) for b in card.locator("b[data-log-prob]").all()]
        assert found == pytest.approx([x for _, x in rows], abs=2e-3)
    shares = [float(card.locator("p").inner_text().split()[-2]) for card in cards.all()[1:]]
    assert shares == pytest.approx(expected["disagreement"], abs=2e-3)
    moved = page.locator("#details tbody tr")
    assert moved.count() == 8
    change = float(moved.nth(0).locator("td").nth(1).inner_text())
    _, before, after = expected["moved"][0]
    assert change == pytest.approx(after - before, abs=5e-3)


@needs_chromium
def test_two_rules_side_by_side_by_keyboard(page):
    choose(page, "rule", "logit-mean")
    choose(page, "other", "prob-mean")
    generate(page, temperature="0.8")
    left, right = finished(page), finished(page, "right")
    assert page.locator("#left h3").inner_text() == "logit-mean"
    assert page.locator("#right h3").inner_text() == "prob-mean"
    expect(left).to_have_count(14)
    expect(right).to_have_count(14)
    expect(page.locator("#trouble [role=alert]")).to_have_count(0)
    page.locator("#right .tok").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#details h3 small")).to_contain_text("by prob-mean")
    expect(page.locator("#right .tok.on")).to_have_attribute("data-k", "2")
    assert "who pushed" not in page.locator("#details").inner_text()
    left.first.click()
    expect(page.locator("#details")).to_contain_text("Nothing moved")
    page.screenshot(path=SHOTS / "compare.png", full_page=True)


@needs_chromium
def test_phone_width_an_empty_prompt_no_members_and_stop(page, url):
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#prompt textarea", "")
    page.click("#go")
    expect(page.locator("#trouble [role=alert]")).to_contain_text("expected a prompt of at least one token")
    generate(page)
    tokens = finished(page)
    expect(page.locator("#trouble [role=alert]")).to_have_count(0)
    tokens.nth(1).click()
    page.wait_for_selector("#details .cards")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=SHOTS / "phone.png", full_page=True)
    for _ in range(5):  # a text may have ended before it is stopped
        generate(page, tokens="200")
        expect(tokens.nth(20)).to_be_visible()  # of the second text
        page.click("#stop")
        counts = [tokens.count()]
        while len(counts) < 2 or counts[-1] != counts[-2]:
            page.wait_for_timeout(1000)
            counts.append(tokens.count())
        if counts[-1] < 200:
            break
    else:
        pytest.fail("no text was stopped")
    for box in page.locator("#members input").all():
        box.uncheck()
    page.click("#go")
    expect(page.locator("#trouble [role=alert]")).to_contain_text("members")


def report(text, **changes):
    found = {
        "text": text, "log_prob": -1.0, "pool_log_prob": -1.2, "member_log_probs": [-1.0], "top": [["a", -1.0]],
        "member_top": [[["a", -1.0]]],
        "moved": [["a", -1.0, -0.5]], "pushes": [[0.5]], "disagreement": [0.1], "disagreement_is_bound": [False],
        "status": "OPTIMAL", "fallback": False, "gap": 0.0, "gap_is_certified": True, "num_passes": 3.0,
        "claims": [], "sources": [],
    }  # fmt: skip
    return found | changes


def test_nothing_that_a_model_or_a_user_writes_becomes_markup():
    evil = "<script>alert(1)</script>'\""
    source = {"start": 0, "end": 7, "path": evil, "below": evil, "line": 3, "changed": False}
    claims = {"claims": [0.25], "sources": [source]}
    token = report(evil, top=[[evil, -1.0]], moved=[[evil, -math.inf, -1.0]], **claims)
    for html in (text_of([token], evil, evil, done=True), details_of(token, [evil], evil, [evil])):
        assert "<script" not in html
        assert evil not in html
    assert "–" in details_of(token, ["m"], "meet", ["files"])


def test_the_page_asks_for_nothing_that_the_server_would_refuse():
    from softmeet.server import ui

    serving = serving_of({"duo": tiny_ensemble("gpt2", "llama")}, ui=True)
    asked = ui._asked(serving, "duo", ["tiny/gpt2", "tiny/llama"], "prob-mean", 2.0)
    assert (asked.rule, asked.trust) == ("prob-mean", None)
    assert ui._asked(serving, "duo", ["tiny/gpt2", "tiny/llama"], "meet", 2.0).trust == 2.0
    blocks = {getattr(block, "elem_id", None): block for block in ui.page(serving).blocks.values()}
    assert blocks["length"].maximum == 64  # the shortest context


def test_a_member_that_was_not_asked_is_said_to_be():
    nan, came = math.nan, [["a", -1.0]]
    token = report(
        "a", member_log_probs=[-1.0, nan], member_top=[came, []], disagreement=[0.0, nan],
        disagreement_is_bound=[True, True], moved=[["a", -1.0, -1.0]], gap=math.inf, gated=True,
    )  # fmt: skip
    html = details_of(token, ["first", "second"], "meet")
    assert "not asked: the gate was closed" in html
    assert "the gate was closed, so the rule was not computed" in html
    assert "nan" not in html + text_of([token], "p", "meet", done=True)


def test_the_root_leads_to_the_page(url):
    found = http.get(f"{url}/", follow_redirects=True)
    assert (found.status_code, str(found.url)) == (200, f"{url}/ui/")
    assert http.get(f"{url}/").json()["page"] == "/ui"
    serving = serving_of({"tiny": tiny_ensemble("gpt2")}, ui=True, protection=Protection(keys=("key",)))
    with running(serving) as locked:
        closed = http.get(f"{locked}/")
        assert (closed.status_code, "location" in closed.headers) == (401, False)
        found = http.get(f"{locked}/", auth=("any", "key"), follow_redirects=True)
        assert (found.status_code, str(found.url)) == (200, f"{locked}/ui/")


def test_the_page_does_not_call_home(url):
    page = http.get(f"{url}/ui/", follow_redirects=True)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.googleapis" not in page.text
    assert http.post(f"{url}/ui/gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_calls_that_are_not_the_pages_are_refused_and_not_repeated_in_the_log(url, capfd, caplog):
    calls = [
        ("run/run", {"data": ["MYSECRET"], "session_hash": "a"}),
        ("queue/join", {"fn_index": 0, "data": ["MYSECRET"], "session_hash": "a"}),
        ("queue/join", {"fn_index": 99, "data": ["MYSECRET"], "session_hash": "a"}),
        ("run/nope", {"data": ["MYSECRET"]}),
    ]
    for path, body in calls:
        answer = http.post(f"{url}/ui/gradio_api/{path}", json=body)
        assert answer.status_code == 200 or (answer.status_code in (400, 404) and set(answer.json()) == {"error"})
    assert http.get(f"{url}/ui/gradio_api/deep_link?session_hash=a").status_code == 404
    printed = capfd.readouterr()
    assert "MYSECRET" not in printed.out + printed.err + caplog.text
    assert "Traceback" not in printed.err


def test_no_call_of_the_page_reads_a_file(url, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("MYSECRET")
    given = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    everything = http.get(f"{url}/ui/config").json()["dependencies"]
    told = ""
    for one in (one for one in everything if one["inputs"]):
        body = {"data": [given] * len(one["inputs"]), "fn_index": one["id"], "session_hash": "thief"}
        for text in (json.dumps(body), json.dumps(body).replace("FileData", "File\\u0044ata")):
            for call in ("queue/join", "run/predict"):
                answer = http.post(f"{url}/ui/gradio_api/{call}", content=text, headers=JSON)
                assert answer.status_code == 400, answer.text
                assert "takes no files" in answer.text
                told += answer.text
    assert len(everything) > 10
    for path in (
        f"file={secret}",
        f"file/{secret}",
        f"proxy={url}/v1/models",
        "component_server",
        "call/run",
        "api/run",
    ):
        answer = http.get(f"{url}/ui/gradio_api/{path}")
        assert answer.status_code == 404
        told += answer.text
    assert "MYSECRET" not in told


def test_no_turn_of_a_conversation_is_a_component(url, tmp_path):
    """Gradio would make it as a visitor says, of any file below its working directory, or of any size."""
    secret, every = tmp_path / "secret", http.get(f"{url}/ui/config").json()["dependencies"]
    secret.write_text("MYSECRET")
    copies = {*Path(tempfile.gettempdir(), "gradio").rglob("secret")}
    components = [
        {"component": "gallery", "value": [{"image": {"path": str(secret)}}], "constructor_args": {}, "props": {}},
        {"component": "dataframe", "value": {"headers": ["a"], "data": [[1]]}, "constructor_args": {"column_count": 9}},
    ]
    for one in (one for one in every if one["inputs"]):
        for content in [{"type": "component", **own} for own in components] + components + [{"file": str(secret)}]:
            turns = [{"role": "user", "content": [content], "metadata": None, "options": None}]
            body = {"data": [turns] * len(one["inputs"]), "fn_index": one["id"], "session_hash": "thief"}
            answer = http.post(f"{url}/ui/gradio_api/queue/join", json=body)
            assert (answer.status_code, "no components" in answer.text) == (400, True)
    assert {*Path(tempfile.gettempdir(), "gradio").rglob("secret")} == copies


def test_no_click_brings_a_component_and_no_visitor_is_without_a_name(url):
    """Gradio would fetch what a click is said to be on, and its queue would end of a visitor without a name."""
    told = {"data": [[]], "fn_index": 0, "session_hash": "thief", "trigger_id": 1}
    values = [{"path": "http://10.0.0.1/x"}, {"file": {"path": "x"}}, {"type": "component", "component": "html"}]
    for value in [*values, [values]]:
        for clicked in ({"index": 0, "value": value}, value):
            answer = http.post(f"{url}/ui/gradio_api/queue/join", json={**told, "event_data": clicked})
            assert (answer.status_code, "no components" in answer.text) == (400, True)
    for call in ("queue/join", "queue/join/", "run/predict"):
        for name in ("", None, "a b", "a" * 65, {}, []):
            answer = http.post(f"{url}/ui/gradio_api/{call}", json={**told, "session_hash": name})
            assert (answer.status_code, "visitor's name" in answer.text) == (400, True)
    for many in ([1] * 10_001, [[{"role": "user", "content": "x"}]] * 4_000):
        answer = http.post(f"{url}/ui/gradio_api/run/predict", json={**told, "data": [many]})
        assert (answer.status_code, "10,000" in answer.text) == (400, True)
    good = {**told, "fn_index": 99, "event_data": {"index": [0, 0], "value": "word"}}
    assert "components" not in http.post(f"{url}/ui/gradio_api/queue/join", json=good).text


def test_the_pages_own_check_of_files_is_on(narrow):
    from fastapi import FastAPI

    from softmeet.server import ui

    app = FastAPI()
    ui.mount(app, serving_of({"default": narrow}, ui=True))
    mounted = next(route for route in app.router.routes if getattr(route, "path", "") == "/ui")
    assert mounted.app.app.get_blocks().has_launched


def test_the_page_keeps_the_texts_of_few_visitors(narrow):
    from softmeet.server import ui

    blocks = ui.page(serving_of({"default": narrow}, ui=True))
    assert blocks.state_session_capacity == 32
    assert blocks._queue.max_size == 32


@pytest.fixture(scope="module")
def chatting():
    ensemble = tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE)
    with running(serving_of({"default": ensemble}, ui=True)) as found:
        yield found


def test_a_conversation_remembers_what_was_said(browser, chatting):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{chatting}/ui")
    box = page.locator("textarea[data-testid=textbox]").first
    for text, count in (("And the king", 1), ("In the", 2)):
        expect(box).to_be_enabled(timeout=PATIENCE)
        box.fill(text)
        box.press("Enter")
        expect(page.locator("#chatbot [data-testid=bot]")).to_have_count(count, timeout=PATIENCE)
    expect(page.locator("#chatbot [data-testid=user]")).to_have_count(2)
    page.screenshot(path=SHOTS / "chat.png")
    page.close()
