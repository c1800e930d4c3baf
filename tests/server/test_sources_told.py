"""Where answers stand in the user's files, and how much these claimed: told by servers that may, to who asks."""

import os
import signal
from statistics import fmean

import pytest
from commands import run
from serving import chunks, http, running, serve, serving_of

from softmeet import Ensemble
from softmeet.hf.chat import take_plain

SAID = "Zorblax the quick went to Quixby, and Zorblax the slow went home.\nNobody saw a häuschen there.\n"
PROMPT = SAID[:33]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = tmp_path_factory.mktemp("project")
    for place, text in {"src/deep/a.txt": f"\n\n{SAID}", "docs/b.md": "Something else. " * 3}.items():
        (found / place).parent.mkdir(parents=True)
        (found / place).write_text(text)
    return found


@pytest.fixture(scope="module")
def ensembles(folders):
    src, docs = folders / "src", folders / "docs"
    found = {
        "tokens": Ensemble.from_pretrained(
            ["wide/gpt2", "wide/llama", f"files:{src}+weight=0.9+relevance=1"], "logit-mean"
        ),
        "bytes": Ensemble.from_pretrained(
            ["mixed/gpt2", "mixed/llama", f"files:{src}+path={docs}+weight=0.97+relevance=1+name=mine"]
        ),
        "models": Ensemble.from_pretrained(["wide/gpt2"]),
    }
    take_plain(found["tokens"].model)
    return found


@pytest.fixture(scope="module")
def serving(ensembles):
    return serving_of(ensembles, sources=True, speculate=2)


@pytest.fixture(scope="module")
def url(serving):
    with running(serving) as found:
        yield found


def sent(url, path="completions", **fields):
    return http.post(f"{url}/v1/{path}", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 24} | fields)


def choice(url, **fields):
    """(the text of the first choice, softmeet's own fields of it)."""
    (found,) = sent(url, **fields).json()["choices"]
    return found["text"], found.get("softmeet")


def streamed(url, **fields):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 24} | fields
    found = [chunk["choices"][0] for chunk in chunks(f"{url}/v1/completions", body)]
    assert not any("sources" in one.get("softmeet", {}) for one in found[:-1])
    return "".join(one["text"] for one in found), found[-1]["softmeet"]


@pytest.mark.parametrize(("model", "below", "fewest"), [("tokens", "deep/a.txt", 6), ("bytes", "src/deep/a.txt", 24)])
def test_stretches_of_an_answer_stand_where_they_are_said_to(url, ensembles, folders, model, below, fewest):
    asked = {"model": model, "max_tokens": 32, "softmeet": {"sources": True}}
    text, ours = choice(url, **asked)
    assert (text, ours) == streamed(url, **asked)
    first, *_ = ours["sources"]
    lines = (folders / "src/deep/a.txt").read_text().split("\n")
    stretch = text[first["start"] : first["end"]]
    assert "häuschen" in stretch  # so that characters are more than bytes
    assert "\n".join(lines[first["line"] - 1 :]).find(stretch) in range(len(lines[first["line"] - 1]))
    assert (first["path"], first["changed"], first["length"] >= fewest) == (below, False, True)
    assert first["before"] + stretch + first["after"] in "\n".join(lines)
    assert len(first["before"] + first["after"]) > 20
    assert first["files"] == ensembles[model].model.claimants[0].name
    assert str(folders) not in sent(url, **asked).text
    assert str(folders) not in sent(url, stream=True, **asked | {"softmeet": {"sources": True, "report": 1}}).text


def test_what_was_claimed_is_the_mean_over_the_answers_tokens_and_asking_changes_no_token(url):
    for model in "tokens", "bytes":
        asked = {"model": model, "n": 2, "temperature": 1, "seed": 3}
        one, other = sent(url, **asked, softmeet={"sources": True, "report": 0}).json()["choices"]
        alone = [found["softmeet"] for found in sent(url, **asked, softmeet={"sources": True}).json()["choices"]]
        plain = sent(url, **asked).json()["choices"]
        for found, quick, silent in zip((one, other), alone, plain, strict=True):
            assert found["text"] == silent["text"]
            each = [token["claims"][0] for token in found["softmeet"]["tokens"]]
            assert min(each) < max(each)
            assert found["softmeet"]["claims"] == [pytest.approx(fmean(each))]
            assert quick["claims"] == [pytest.approx(fmean(each), abs=1e-6)]
            assert quick["sources"] == found["softmeet"]["sources"]
            assert "softmeet" not in silent


@pytest.mark.parametrize("model", ["tokens", "bytes"])
def test_of_any_text_that_can_be_had_written_it_is_told_and_places_are_those_of_characters(url, model):
    forced = {"structured_outputs": {"choice": ["Höhöhö! Zorblax the slow went home.\nHöhöhö!"]}, "max_tokens": 99}
    text, ours = choice(url, model=model, **forced, softmeet={"sources": True})
    (one,) = ours["sources"]
    assert text[one["start"] : one["end"]].strip() == "Zorblax the slow went home."


def test_chats_and_responses_have_them_too_and_who_has_no_files_has_none(url):
    ours = {"softmeet": {"sources": True}, "temperature": 0}
    said = {"messages": [{"role": "user", "content": SAID + PROMPT}], "max_tokens": 24}
    (chat,) = http.post(f"{url}/v1/chat/completions", json=ours | said).json()["choices"]
    asked = ours | {"input": SAID + PROMPT, "max_output_tokens": 24}
    whole = http.post(f"{url}/v1/responses", json=asked).json()["output"][0]
    (last,) = chunks(f"{url}/v1/responses", asked)[-1]["response"]["output"]
    for text, found in (chat["message"]["content"], chat), (whole["content"][0]["text"], whole):
        assert found["softmeet"]["claims"][0] > 0
        assert all(text[one["start"] : one["end"]] in SAID for one in found["softmeet"]["sources"])
    assert last["softmeet"] == whole["softmeet"]
    assert choice(url, model="models", **ours)[1] == {"claims": [], "sources": []}
    # Plain sampling by prob-mean, for which each token would else be drawn from one member.
    plain = {"temperature": 1, "softmeet": {"rule": "prob-mean", "sources": True}}
    assert choice(url, model="tokens", **plain)[1]["claims"][0] > 0
    left_out = ours | {"softmeet": {"sources": True, "members": ["wide/gpt2"]}}
    assert choice(url, **left_out)[1] == {"claims": [], "sources": []}


def test_a_server_tells_no_place_unless_it_was_started_so(ensembles, folders):
    with running(serving_of({"tokens": ensembles["tokens"]})) as url:
        refused = sent(url, softmeet={"sources": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "softmeet.sources")
        assert "softmeet serve --sources" in refused.json()["error"]["message"]
        told = [sent(url, softmeet={"report": 2}, **more).text for more in ({}, {"stream": True}, {"logprobs": 2})]
        told += [
            http.get(f"{url}{path}").text for path in ("/", "/v1/models", "/metrics", "/api/tags", "/openapi.json")
        ]
    assert not any("a.txt" in text or str(folders) in text for text in told)


def test_the_command_tells_them_if_it_is_started_so(folders):
    def asked(url):
        try:
            return choice(url, softmeet={"sources": True})[1]
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    beside = f"files:{folders / 'src'}+weight=0.9+relevance=1"
    done, ours = serve("-m", "wide/gpt2", "-m", beside, "--sources", "--no-ui", meanwhile=asked)
    assert ours["sources"][0]["path"] == "deep/a.txt", done.stderr
    # An address that is not this machine's, so that nothing is served.
    alone = run("serve", "wide", "--sources", "--open", "--host", "203.0.113.1")
    assert "name them beside the models" in " ".join(alone.stderr.split())
