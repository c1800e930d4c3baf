"""The page at /ui in a real headless Chromium, as a visitor uses it. Screenshots are kept in build/screenshots."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import PATIENCE, needs_chromium
from playwright.sync_api import expect
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble
from test_client_javascript import needs_npm

from softmeet import Ensemble
from softmeet.hf.chat import take_plain
from softmeet.server.security import Protection

PAGE = Path(__file__).parents[2] / "src/softmeet/server/page"
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'"{record}'
expect.set_options(timeout=PATIENCE)
pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def serving(narrow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "a.txt").write_text("\nAnd the king said unto Zorblax the quick, and unto no other one.\n" * 3)
    every = {
        "narrow": narrow, "mixed": Ensemble.from_pretrained("mixed", "prob-mean"),
        "files": Ensemble.from_pretrained(["wide/gpt2", f"files:{folder}+weight=0.95+relevance=1"]),
    }  # fmt: skip
    for ensemble in every.values():
        take_plain(ensemble.model)
    return serving_of(every, ui=True, sources=True)


@pytest.fixture(scope="module")
def url(serving):
    with running(serving) as found:
        yield found


@contextmanager
def opened(browser, url, view="chat", **options):
    """A page that asks nobody but its server, and says nothing on the console but of answers that are errors."""
    context = browser.new_context(**{"viewport": {"width": 1180, "height": 900}} | options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    elsewhere, complaints = [], []
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{url}/ui/#{view}")
    yield page
    assert not elsewhere
    assert not [text for text in complaints if not re.search(r"status of (4|5)|ERR_CONNECTION|ERR_FAILED", text)]
    assert not page.evaluate("window.hacked")
    context.close()


@pytest.fixture
def page(browser, url):
    with opened(browser, url) as found:
        yield found


def settings(page, **values):
    for name, value in values.items():
        (page.select_option if name in ("ensemble", "rule") else page.fill)(f"#{name}", str(value))


def ask(page, text, **values):
    settings(page, **values)
    page.fill("#message", text)
    page.press("#message", "Enter")
    return ended(page, ".turn.assistant")


def ended(page, which):
    """The tokens of the last such text, once it is whole."""
    found = page.locator(which).last
    expect(found.locator(".tok").first).to_be_visible()
    expect(page.locator(".writing")).to_have_count(0)
    return found.locator(".tok")


def nats(page, card):
    return [float(b.get_attribute("data-nats")) for b in page.locator(".card").nth(card).locator("b").all()]


def texts(tokens):
    return tokens.all_text_contents()


def told(page, events, status=200):
    """Have answers be these events, each a dict, or the text of one."""
    lines = (one if isinstance(one, str) else f"data: {json.dumps(one)}\n\n" for one in events)
    body, kind = "".join(lines), "text/event-stream"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, body=body, content_type=kind))


def token(text, token=0, **changes):
    found = {
        "token": token, "text": text, "log_prob": -1.0, "pool_log_prob": -1.2, "moved": [], "pushes": [],
        "member_log_probs": [-1.0, -4.0, -1.0, None], "top": [[text, -1.0]],
        "member_top": [[[text, -1.0]], [["another", -0.1]], [[text, -1.0]], []],
        "disagreement": [0.1, None, 0.0, None], "disagreement_is_bound": [False] * 4, "status": "OPTIMAL",
        "fallback": False, "gap": 0.0, "gap_is_certified": True, "num_passes": 0.0, "gated": False, "claims": [],
        "sources": [],
    }  # fmt: skip
    return found | changes


def delta(content, *tokens):
    return {"choices": [{"index": 0, "delta": {"content": content}, "softmeet": {"tokens": list(tokens)}}]}


def test_an_answer_streams_and_what_stands_behind_its_tokens_is_what_the_api_reports(page, url):
    tokens = ask(page, "And the king", temperature=0, length=12, seed=3)
    body = {"model": "narrow", "temperature": 0, "max_tokens": 12, "seed": 3, "softmeet": {"report": 10}}
    said = {"messages": [{"role": "user", "content": "And the king"}]}
    (choice,) = http.post(f"{url}/v1/chat/completions", json=body | said).json()["choices"]
    assert "".join(texts(tokens)) == choice["message"]["content"]
    reports = choice["softmeet"]["tokens"]
    for k in (0, 3):
        tokens.nth(k).click()
        for card, rows in enumerate([reports[k]["top"], *reports[k]["member_top"]]):
            assert nats(page, card) == pytest.approx([x for _, x in rows], abs=2e-3)
    k, rows = next((k, one["moved"]) for k, one in enumerate(reports) if any(x != y for _, x, y in one["moved"]))
    tokens.nth(k).click()
    change = float(page.locator(".moves tbody tr").first.locator("td").nth(1).text_content())
    assert change == pytest.approx(rows[0][2] - rows[0][1], abs=6e-4)
    expect(page.locator(".turn.assistant .sum")).to_contain_text(re.compile(r"12 tokens · .* a second"))
    page.screenshot(path=SHOTS / "chat.png", full_page=True)


def test_again_edit_and_another_token_go_on_from_there(page):
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    first = texts(ask(page, "In the", temperature=1, length=10, seed=5))
    page.click("#again")
    assert texts(ended(page, ".turn.assistant")) == first  # the seed is the same
    page.locator(".turn.assistant .tok").nth(4).click()
    other = page.locator(".card").first.locator(".if").last
    word = other.inner_text().replace("␣", " ").replace("⏎", "\n")
    other.click()
    changed = texts(ended(page, ".turn.assistant"))
    assert (changed[:4], changed[4]) == (first[:4], word)
    assert len(changed) > 5
    assert bodies[-1]["continue_final_message"]
    assert bodies[-1]["messages"][-1] == {"role": "assistant", "content": "".join(first[:4]) + word}
    page.click("#undo")
    assert texts(page.locator(".turn.assistant .tok")) == first


def test_what_is_edited_or_cleared_is_there_until_something_else_is_asked(page):
    ask(page, "And", length=4)
    ask(page, "But", length=4)
    page.fill("#message", "a draft")
    for leave in (lambda: page.click("#cancel"), lambda: page.press("#message", "Escape")):
        page.locator(".turn.user .edit").first.click()
        assert page.input_value("#message") == "And"
        leave()
        assert page.input_value("#message") == "a draft"
    said = page.locator("#log .turn .text")
    before = said.all_text_contents()
    page.locator(".turn.user .edit").first.click()
    ask(page, "In the")
    assert said.all_text_contents()[0] == "In the"
    expect(said).to_have_count(2)
    page.click("#undo")
    assert said.all_text_contents() == before
    page.click("#clear")
    expect(said).to_have_count(0)
    page.click("#undo")
    assert said.all_text_contents() == before
    page.click("#clear")
    ask(page, "So")
    expect(page.locator("#undo")).to_be_hidden()


def test_an_answer_that_was_cut_is_gone_on_with(page):
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    first = texts(ask(page, "And", length=4, temperature=0))
    expect(page.locator(".turn.assistant .sum")).to_contain_text("ended at the most tokens")
    page.click("#more")
    more = texts(ended(page, ".turn.assistant"))
    assert (more[:4], len(more)) == (first, 8)
    assert bodies[-1]["messages"][-1] == {"role": "assistant", "content": "".join(first)}
    page.click("#tab-inside")
    page.click("#go")
    text = "".join(texts(ended(page, "#text")))
    page.click("#inside-more")
    assert ended(page, "#text").count() == 8
    assert bodies[-1]["prompt"] == page.input_value("#prompt") + text


def test_a_reload_loses_neither_the_conversation_nor_settings(page):
    settings(page, ensemble="mixed", temperature=0.3, length=5, system="Be brief.")
    page.locator("#member-1").uncheck()
    first = texts(ask(page, "And"))
    page.click("#theme")
    page.reload()
    assert texts(page.locator(".turn.assistant .tok")) == first
    page.locator(".turn.assistant .tok").first.click()
    expect(page.locator(".cards")).to_be_visible()
    found = {name: page.input_value(f"#{name}") for name in ("ensemble", "temperature", "length", "system")}
    assert found == {"ensemble": "mixed", "temperature": "0.3", "length": "5", "system": "Be brief."}
    assert [page.locator(f"#member-{k}").is_checked() for k in (0, 1)] == [True, False]
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_view_follows_an_answer_and_stays_at_a_word_that_is_looked_behind(browser, url):
    with opened(browser, url, viewport={"width": 1180, "height": 500}) as page:
        told(page, [*(delta(f" w{k}\n", token(f" w{k}\n")) for k in range(60)), "data: [DONE]\n\n"])
        tokens = ask(page, "a")
        expect(tokens.last).to_be_in_viewport()
        ask(page, "another")
        expect(page.locator(".turn.assistant .tok").last).to_be_in_viewport()
        word = page.locator(".turn.assistant").last.locator(".tok").nth(30)
        word.click()
        expect(word).to_be_in_viewport()
        expect(page.locator(".details h3")).to_be_in_viewport()
        assert word.evaluate("one => one.getBoundingClientRect().bottom") <= page.locator(".details").evaluate(
            "one => one.getBoundingClientRect().top"
        )


def test_code_and_bold_are_set_apart_and_copied_as_they_are(page):
    words = ["See", " ``", "`py", "\n", "x = 1", "\n", "```\n", "so **", "bold", "** and", " `tick`", " end"]
    told(page, [*(delta(word, token(word)) for word in ["See", "\n", "```", *words[2:]]), "data: [DONE]\n\n"])
    tokens = ask(page, "a")
    kinds = tokens.evaluate_all(
        "all => all.map((one) => [...one.classList].filter((name) => /code|bold|tick/.test(name)).join())"
    )
    assert kinds == ["", "", *["code"] * 6, *["bold"] * 3, "tick", ""]
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.turn.assistant .text'))")
    assert page.evaluate("getSelection().toString()").strip() == "See\n```" + "".join(words[2:])


def test_keys_alone_ask_stop_and_ask_again(page):
    settings(page, length=2000, ensemble="mixed")
    page.fill("#message", "And")
    page.focus("#send")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant .tok").nth(3)).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Enter")
    expect(page.locator(".writing")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("But")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant .tok").nth(3)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".writing")).to_have_count(0)


def test_a_single_model_doubts_nothing(page):
    one = {"member_log_probs": [-9.0], "member_top": [[["another", -0.1]]], "disagreement": [0.0]}
    told(page, [delta("a", token("a", disagreement_is_bound=[False], **one)), "data: [DONE]\n\n"])
    for k in (1, 2, 3):
        page.locator(f"#member-{k}").uncheck()
    tokens = ask(page, "a")
    assert "doubt" not in tokens.first.get_attribute("class")
    expect(page.locator(".turn.assistant .sum")).not_to_contain_text("disagreement")


def test_stop_keeps_what_came(page):
    settings(page, length=2000, ensemble="mixed")
    page.fill("#message", "And")
    page.click("#send")
    expect(page.locator(".turn.assistant .tok").nth(3)).to_be_visible()
    page.click("#stop")
    count = ended(page, ".turn.assistant").count()
    page.wait_for_timeout(500)
    assert page.locator(".turn.assistant .tok").count() == count < 20_000


TEXTS = [("narrow", "And the king said unto his"), ("narrow", "Café 🙂 said"), ("mixed", "Café 🙂 and the king")]


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_a_text_is_scored_by_what_the_api_reports(page, url, name, text):
    settings(page, ensemble=name)
    page.click("#tab-inside")
    page.fill("#prompt", text)
    page.click("#score")
    expect(page.locator("#text .bits")).to_be_visible()
    assert "".join(texts(page.locator("#text .text"))) == text
    body = {"model": name, "prompt": text, "max_tokens": 0, "prompt_logprobs": 0, "softmeet": {"report": 1}}
    answer = http.post(f"{url}/v1/completions", json=body).json()
    reports, members = answer["choices"][0]["softmeet"]["tokens"], answer["softmeet"]["members"]
    each = zip(*([one["log_prob"], *one["member_log_probs"]] for one in reports), strict=True)
    rows = page.locator("#text tbody tr")
    assert rows.locator("th").all_inner_texts() == ["all as one", *members]
    found = [float(row.locator("td").first.inner_text()) for row in rows.all()]
    # Over bytes nobody predicts the first character, here of one byte.
    assert found == pytest.approx([-sum(own) / math.log(2) for own in each], abs=0.51)
    page.locator("#text .tok").nth(2).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#text .tok.on")).to_have_attribute("data-k", "3")
    assert page.locator(".card h4").all_inner_texts() == ["all as one", *members]
    assert page.evaluate("document.activeElement.className") == "details"
    page.keyboard.press("Escape")
    expect(page.locator(".details")).to_have_count(0)
    assert page.evaluate("document.activeElement.dataset.k") == "3"


def test_bytes_are_shown_as_characters_with_each_members_own_tokens(page):
    tokens = ask(page, "And the king", ensemble="mixed", length=30, temperature=0.5, seed=1)
    assert all(len(text) == 1 for text in texts(tokens))
    words = []
    for k in range(6):
        tokens.nth(k).click()
        words += page.locator(".card").nth(1).locator("code").all_inner_texts()
    assert max(map(len, words)) > 1
    # From another whole character the text goes on, not from half of one or from a token that has begun before.
    one = delta("a", token("a", 97, top=[["a", -1.0], ["\\xC3", -1.5], ["b", -2.0]])) | {
        "softmeet": {"vocabulary": "bytes"}
    }
    told(page, [one, "data: [DONE]\n\n"])
    ask(page, "a").first.click()
    assert page.locator(".turn.assistant").last.locator(".if").all_inner_texts() == ["b"]
    expect(page.locator(".details").last).to_contain_text("character by character")


def test_columns_are_what_each_answers_alone(page, url):
    settings(page, temperature=0, length=8, seed=2)
    page.click("#tab-compare")
    page.fill("#question", "And the king")
    page.click("#compare-go")
    expect(page.locator(".columns .sum")).to_have_count(3)
    for column in page.locator(".columns article").all():
        tokens = ended(page, ".columns article")
        name = column.locator("h3").inner_text()
        ours = {} if name == "all as one" else {"members": [name]}
        body = {"temperature": 0, "max_tokens": 8, "seed": 2, "softmeet": ours}
        said = {"messages": [{"role": "user", "content": "And the king"}]}
        answer = http.post(f"{url}/v1/chat/completions", json=body | said).json()["choices"][0]
        assert "".join(texts(column.locator(".tok"))) == answer["message"]["content"]
        expect(column.locator(".sum")).to_contain_text("bits a byte")
    assert tokens.count()
    # What is chosen stays chosen where members change, and a rule that is chosen is no column of its own.
    page.locator("#columns input").nth(2).uncheck()
    page.locator("#members input").last.uncheck()
    assert [own.is_checked() for own in page.locator("#columns input").all()[:4]] == [True, True, False, False]
    settings(page, ensemble="mixed")
    assert [own.is_checked() for own in page.locator("#columns input").all()[:4]] == [True, True, True, False]
    settings(page, ensemble="narrow", rule="prob-mean")
    labels = page.locator("#columns label").all_inner_texts()
    assert ("prob-mean" in labels, "meet" in labels) == (False, True)
    page.screenshot(path=SHOTS / "compare.png", full_page=True)


def test_where_an_answer_stands_in_files_is_said(page):
    tokens = ask(page, "And the king said unto Zorblax", ensemble="files", temperature=0, length=12)
    tokens.last.click()
    expect(page.locator(".details")).to_contain_text(re.compile(r"claimed \d+\.\d% of the mix"))
    expect(page.locator(".details")).to_contain_text(re.compile(r"this stands in a\.txt, line \d"))
    expect(page.locator(".details pre mark").first).to_contain_text(tokens.last.inner_text())
    page.select_option(".legend select", "who")
    expect(page.locator(".legend")).to_contain_text("files")


def test_a_saved_page_opens_without_a_server_and_runs_nothing_of_its_texts(browser, url, tmp_path):
    with opened(browser, url) as page:
        written = delta(EVIL, token(EVIL, member_top=[[[EVIL, -1.0]], [[EVIL, None]], [], []]))
        source = {"path": EVIL, "line": 1, "start": 0, "end": 3, "changed": False, "before": EVIL, "after": "!"}
        written["choices"][0]["softmeet"]["sources"] = [source]
        told(page, [written, "data: [DONE]\n\n"])
        tokens = ask(page, EVIL, ensemble="files")
        assert texts(tokens) == [EVIL]
        tokens.first.click()
        expect(page.locator(".cards code").first).to_contain_text("<script>")
        settings(page, ensemble="narrow")  # which has no files, but wrote nothing of what is saved
        with page.expect_download() as download:
            page.click("#share")
        download.value.save_as(tmp_path / "saved.html")
    context = browser.new_context(offline=True)
    saved, wrong = context.new_page(), []
    saved.on("console", lambda m: wrong.append(m.text))
    saved.on("pageerror", lambda error: wrong.append(str(error)))
    saved.goto(f"file://{tmp_path / 'saved.html'}")
    assert texts(saved.locator(".tok")) == [EVIL]
    saved.locator(".tok").first.click()
    expect(saved.locator(".cards")).to_be_visible()
    assert saved.locator(".details pre").inner_text() == f"{EVIL}{EVIL[:3]}!"
    expect(saved.locator(".note")).to_contain_text("may hold text of the files")
    assert not saved.evaluate("window.hacked")
    assert not wrong
    context.close()


def test_what_is_impossible_is_not_what_is_certain(page):
    impossible = token("a", log_prob=None, member_log_probs=[None, -1.0, -1.0, None])
    told(page, [delta("a", impossible), "data: [DONE]\n\n"])
    tokens = ask(page, "a")
    expect(page.locator(".turn.assistant .sum")).to_contain_text("surprise ∞ nats · disagreement ∞")
    assert tokens.first.evaluate("one => one.style.getPropertyValue('--rare')") == "1.000"
    tokens.first.click()
    assert page.locator(".card p").all_inner_texts() == [
        "this token: 0.00%", "this token: 0.00%", "disagrees by 0.1000 nats", "this token: 36.79%",
        "disagrees by more than any number of nats", "this token: 36.79%", "disagrees by 0.0000 nats",
        "not asked: the gate was closed",
    ]  # fmt: skip


def test_an_answer_that_cannot_be_made_anew_is_there_again(page):
    first = texts(ask(page, "And", length=5))
    page.fill("#message", "a draft")
    for begin in ("#again", ".card .if >> nth=0"):
        page.locator(".turn.assistant .tok").nth(2).click()
        told(page, ["no JSON"], 500)
        page.click(begin)
        expect(page.locator("#trouble")).to_contain_text("the server answered 500")
        assert (texts(page.locator(".tok")), page.input_value("#message")) == (first, "a draft")
        page.unroute("**/v1/chat/completions")
    page.fill("#key", "ключ")  # which is not needed here
    page.press("#key", "Tab")
    page.click("#again")
    assert len(texts(ended(page, ".turn.assistant"))) == 5
    expect(page.locator("#trouble")).to_be_hidden()
    page.click("#clear")
    page.fill("#message", "")
    page.fill("#length", "")
    page.click("#example")
    page.click("#send")
    assert ended(page, ".turn.assistant").count() > 5


def test_what_is_put_in_has_no_figures_and_places_are_those_of_the_whole_text(page):
    words = ["And", " the", " king"]
    source = {"files": "f", "path": "a.txt", "line": 3, "start": 4, "end": 7, "length": 3, "changed": False}
    source |= {"before": "one\ntwo\nA ", "after": " end\nlast"}
    one = {"claims": [0.5], "top": [["word", -1.0], [" no", -2.0]], "moved": [[" no", -1.0, -2.0]]}
    one |= {"pushes": [[0.0] * 4]}
    events = [delta(word, token(word, **one)) for word in words]
    events[-1]["choices"][0]["softmeet"]["sources"] = [source]
    told(page, [*events, "data: [DONE]\n\n"])
    tokens = ask(page, "a", ensemble="files")
    for k, stands in enumerate([False, True, False]):
        tokens.nth(k).click()
        assert ("a.txt, line 3" in page.locator(".details").inner_text()) == stands
        assert page.locator(".details pre").all_text_contents() == ["one\ntwo\nA the end\nlast"] * stands
    assert page.locator(".details mark").count() == 0
    page.locator(".card").first.locator(".if").last.click()
    changed = ended(page, ".turn.assistant")
    assert texts(changed) == ["And", " the", " no", *words]
    expect(page.locator(".sum").last).to_contain_text("surprise 1.00 nats")
    for k, stands in enumerate([False, True, False, False, True, False]):
        changed.nth(k).click()
        said = page.locator(".details").inner_text()
        assert ("a.txt, line 3" in said, "put here" in said, "this token" in said) == (stands, k == 2, k != 2)


def test_emoji_cut_in_two_and_text_from_right_to_left(page):
    halves = [token("�", 1), token("�", 2)]
    told(page, [delta("", halves[0]), delta("🙂", halves[1]), delta("שלום", token("שלום")), "data: [DONE]\n\n"])
    tokens = ask(page, "a")
    assert texts(tokens) == ["🙂", "שלום"]
    assert page.locator(".turn.assistant .text").get_attribute("dir") == "auto"
    # Where one event has several tokens, each has what the stream says of it, with the space that its text lacks.
    page.unroute("**/v1/chat/completions")
    told(page, [delta(" the king", token("the"), token("king")), "data: [DONE]\n\n"])
    tokens = ask(page, "b")
    assert texts(tokens) == [" the", " king"]
    # The second member was sure of another one, and gave this one little.
    assert [("doubt" in one.get_attribute("class").split()) for one in tokens.all()] == [True, True]
    page.unroute("**/v1/chat/completions")
    told(page, [delta("the", token("the", member_log_probs=[-1.0, -1.0, -1.0, None])), "data: [DONE]\n\n"])
    assert ask(page, "c").get_attribute("class") == "tok"


@pytest.mark.parametrize(
    ("events", "status", "message"),
    [
        (
            [delta("The", token("The")), {"error": {"message": "it went wrong"}}, "data: [DONE]\n\n"],
            200,
            "it went wrong",
        ),
        ([delta("The", token("The"))], 200, "the answer broke off"),
        (["no JSON"], 500, "the server answered 500"),
    ],
)
def test_errors_are_said_and_what_came_is_kept(page, events, status, message):
    told(page, events, status)
    page.fill("#message", "a")
    page.press("#message", "Enter")
    expect(page.locator("#trouble")).to_contain_text(message)
    expect(page.locator(".turn.assistant")).to_have_count(int(status == 200))
    assert page.input_value("#message") == ("" if status == 200 else "a")
    page.unroute("**/v1/chat/completions")
    assert ask(page, "b", length=3).count()
    expect(page.locator("#trouble")).to_be_hidden()


def test_a_server_that_never_answers_is_left_by_stop(page):
    page.route("**/v1/chat/completions", lambda route: None)
    page.fill("#message", "a")
    page.press("#message", "Enter")
    page.fill("#message", "typed meanwhile")
    page.click("#stop")
    expect(page.locator("#log .turn")).to_have_count(1)  # the question, as another one is typed
    assert page.input_value("#message") == "typed meanwhile"
    page.unroute("**/v1/chat/completions")
    page.click("#again")
    assert ended(page, ".turn.assistant").count()


def test_what_ends_an_answer_is_no_part_of_it(page):
    end = delta("", token("</s>", top=[["</s>", -1.0], ["<|im_end|>", -2.0], ["word", -3.0]], member_top=[[]] * 4))
    end["choices"][0]["finish_reason"] = "stop"
    told(page, [delta("The", token("The")), end, "data: [DONE]\n\n"])
    assert texts(ask(page, "a")) == ["The", ""]
    page.locator(".turn.assistant .tok").last.click()  # it has a sign, which can be chosen
    assert page.locator(".if").all_inner_texts() == ["word"]
    page.click("#tab-inside")  # and a text of bytes goes on from another one, too
    page.unroute("**/v1/chat/completions")
    page.click("#tab-chat")
    page.click("#clear")
    first = texts(ask(page, "And the king", ensemble="mixed", length=8, seed=1))
    page.locator(".turn.assistant .tok").nth(3).click()
    page.locator(".card").first.locator(".if").last.click()
    assert texts(ended(page, ".turn.assistant"))[:3] == first[:3]


def test_a_server_that_has_stopped_is_said_to_be(browser):
    ensemble = tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE)
    with running(serving_of({"tiny": ensemble}, ui=True)) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{url}/ui")
        page.wait_for_selector("#message")
        assert page.evaluate("document.activeElement.id") == "message"
    page.fill("#message", "a")
    page.press("#message", "Enter")
    expect(page.locator("#trouble")).to_contain_text("the server cannot be reached")
    context.close()


def test_a_key_is_asked_for_and_kept_in_the_tab(browser):
    ensemble = tiny_ensemble("gpt2", "llama", rule="logit-mean", template=TEMPLATE)
    protection = Protection(keys=("secret",))
    with running(serving_of({"tiny": ensemble}, ui=True, protection=protection)) as url, opened(browser, url) as page:
        for key, count in (("wrong", 0), ("secret", 1)):
            page.fill("#trouble #key", key)
            page.press("#trouble #key", "Enter")
            expect(page.locator("#message")).to_have_count(count)
            expect(page.locator("#trouble #key")).to_have_count(1 - count)
        assert ask(page, "hello", length=3).count()
        page.reload()
        assert ask(page, "hello", length=3).count()
        assert page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"


def test_a_server_that_lets_nothing_be_changed_is_asked_for_nothing_else(browser):
    ensemble = tiny_ensemble("gpt2", "llama", rule="meet", template=TEMPLATE)
    with running(serving_of({"tiny": ensemble}, ui=True, allowed=())) as url, opened(browser, url) as page:
        expect(page.locator("#rule")).to_be_disabled()
        expect(page.locator("#members input:enabled")).to_have_count(0)
        expect(page.locator("#trust, [id^=weight-]")).to_have_count(0)
        assert ask(page, "hello", length=3).count()


def test_members_weights_and_rules_are_what_is_asked(page):
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json["softmeet"]) if r.method == "POST" else None)
    assert page.input_value("#length") == "128"  # half of the context
    ask(page, "a", length=2)
    page.locator("#weight-1").fill("0.9")
    settings(page, rule="prob-mean")
    expect(page.locator("#trust")).to_be_hidden()
    ask(page, "a", length=2)
    page.locator("#members input").first.uncheck()
    ask(page, "a", length=2)
    assert bodies[0] == {"report": 10}
    assert (bodies[1]["rule"], bodies[1]["weights"][1]) == ("prob-mean", 0.9)
    assert len(bodies[2]["members"]) == page.locator("#members input").count() - 1
    boxes = page.locator("#members input").all()
    for box in boxes[1:-1]:
        box.uncheck()
    assert [box.is_disabled() for box in boxes] == [False] * (len(boxes) - 1) + [True]  # somebody has to answer
    settings(page, ensemble="mixed")
    assert page.locator("#rule option").first.inner_text() == "prob-mean"


def test_a_conversation_that_fills_the_context_goes_on_without_its_beginning(page):
    for k in range(3):
        ask(page, f"{k} " + "and the king said unto his daughter " * 12, length=2)
    expect(page.locator(".turn.assistant .sum").last).to_contain_text("were left out")


def test_two_thousand_tokens_and_typing_does_not_wait(page):
    told(page, [*(delta(f" w{k}", token(f" w{k}")) for k in range(2000)), "data: [DONE]\n\n"])
    page.evaluate(
        """() => {
        window.longest = 0; let before = performance.now();
        const tick = () => { const now = performance.now(); window.longest = Math.max(window.longest, now - before);
            before = now; requestAnimationFrame(tick); };
        requestAnimationFrame(tick);
    }"""
    )
    page.fill("#message", "a")
    page.press("#message", "Enter")
    page.fill("#message", "typed meanwhile")
    expect(page.locator(".turn.assistant .tok")).to_have_count(2000)
    assert page.input_value("#message") == "typed meanwhile"
    assert page.evaluate("window.longest") < 2000  # of a busy machine
    page.locator(".tok").nth(1999).click()
    expect(page.locator(".details")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1180])
@needs_npm
def test_nothing_is_wider_than_a_phone_and_axe_finds_nothing_serious(browser, url, axe, width, scheme):
    size = {"width": width, "height": 844}
    with opened(browser, url, bypass_csp=True, viewport=size, color_scheme=scheme) as page:
        if width < 900:
            assert page.locator("#settings").is_hidden()
            page.click("#settings-toggle")
            expect(page.locator("#ensemble")).to_be_in_viewport()
            assert page.evaluate("document.activeElement.id") == "ensemble"
            settings(page, length=12)
            page.mouse.click(195, 830)
            assert page.locator("#settings").is_hidden()
        ask(page, "And the king").nth(2).click()
        page.add_script_tag(content=axe)
        for view in ("chat", "inside", "compare"):
            page.click(f"#tab-{view}")
            page.screenshot(path=SHOTS / f"{view}-{width}-{scheme}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = page.evaluate("axe.run()")["violations"]
            serious = [one for one in found if one["impact"] in ("serious", "critical")]
            assert not serious, json.dumps(serious, indent=1)[:3000]


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axe")
    command = [shutil.which("npm"), "install", "--no-audit", "--no-fund", "--prefix", folder, "axe-core@4"]
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


def test_the_page_is_small_quick_and_strict(browser, url):
    found = http.get(f"{url}/ui/")
    policy = found.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert sum(path.stat().st_size for path in PAGE.iterdir()) <= 150_000
    assert sum(len(path.read_text().splitlines()) for path in PAGE.glob("*.js")) <= 1500
    for path in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", "nothing.js"):
        assert http.get(f"{url}/ui/{path}").status_code in (401, 404)
    assert http.post(f"{url}/ui/", json={}).status_code == 405
    with opened(browser, url) as page:
        page.wait_for_selector("#message")
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        times = []
        for _ in range(5):
            page.reload()
            page.wait_for_selector("#message")
            times.append(page.evaluate(paint))
        assert min(times) < 300
