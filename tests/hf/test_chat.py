"""Conversations: each member's own chat template, in Python, on the command line and over the wire."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from byte_members import save, save_two
from serving import TEMPLATE, http, running, serving_of, tiny_ensemble
from transformers import AutoTokenizer
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.errors import InvalidInputError
from softmeet.hf import chat as chat_module
from softmeet.hf.chat import ChatTemplates, chat_of
from softmeet.hf.sampling import RowSampler
from softmeet.members import zoo
from softmeet.readers.bytes.next_tokens import END

TURNS = [{"role": "system", "content": "the"}, {"role": "user", "content": "he t\u00e9"}]
OTHER = "{% for m in messages %}{{ m.content }}\n{% endfor %}the "


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members over bytes, each with a template of its own."""
    found = save_two(tmp_path_factory.mktemp("chat"))
    for where, template in zip(found, (TEMPLATE, OTHER), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(where)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(where)
    return found


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders, "prob-mean", vocabulary="bytes")


def expected(ensemble, prompts, seed, count):
    """The bytes of what generate() gives behind each member's own tokens."""
    begun = torch.tensor([[END]])
    out = ensemble.model.generate(
        begun, attention_mask=torch.ones_like(begun), prefixes=[prompts], do_sample=True, top_k=0,
        max_new_tokens=count, row_sampler=RowSampler(seed, [0]),
    )  # fmt: skip
    return bytes(token for token in out[0, 1:].tolist() if token != END).decode(errors="ignore")


def test_over_bytes_each_member_begins_after_its_own_prompt(ensemble, folders):
    own = chat_of(ensemble.model).own_prompts([TURNS, TURNS])
    texts = ["s:the!u:he t\u00e9!a:", "the\nhe t\u00e9\nthe "]
    for reader, ids, text in zip(ensemble.model.readers, own, texts, strict=True):
        assert reader.spelling.spelled(ids).decode().strip() == text.strip()
    text = ensemble.generate(TURNS, seed=4, max_new_tokens=16)
    assert text.rstrip("\ufffd") == expected(ensemble, own, 4, 16)
    assert "".join(ensemble.stream(TURNS, seed=4, max_new_tokens=16)) == text
    both = ensemble.generate([TURNS, "the"], do_sample=False, max_new_tokens=8)
    assert both == [ensemble.generate(prompt, do_sample=False, max_new_tokens=8) for prompt in (TURNS, "the")]


def test_over_the_wire_it_is_the_same_text(ensemble, caplog):
    body = {"messages": TURNS, "seed": 4, "max_tokens": 16, "temperature": 1}
    serving = serving_of({"pair": ensemble})
    with caplog.at_level("INFO", "softmeet.access"), running(serving) as url:
        answer = http.post(f"{url}/v1/chat/completions", json=body).json()
        counted = serving.metrics.registry.get_sample_value("softmeet_prompt_tokens_total")
        with http.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}) as stream:
            chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    text = answer["choices"][0]["message"]["content"]
    assert text == ensemble.generate(TURNS, seed=4, max_new_tokens=16)
    assert "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]) == text
    size = answer["usage"]["softmeet"]["prompt_bytes"]
    assert size == sum(len(turn["content"].encode()) for turn in TURNS)
    own = chat_of(ensemble.model).own_prompts([TURNS, TURNS])
    members = answer["usage"]["softmeet"]["members"].values()
    assert [one["prompt_tokens"] for one in members] == [len(ids) for ids in own]
    assert answer["usage"]["prompt_tokens"] == len(own[0]) == counted
    assert f"pair {len(own[0])} tokens+{len(text.encode())} bytes, first" in caplog.text
    assert "plain_chat" not in answer["softmeet"]


def test_a_member_without_a_template_is_named_or_takes_the_plain_one(folders, tmp_path):
    bare = save(tmp_path / "bare", "gpt2", 5)
    pair = Ensemble.from_pretrained([folders[1], bare], "prob-mean", vocabulary="bytes")
    with pytest.raises(InvalidInputError, match="bare has no chat template"):
        pair.generate(TURNS, max_new_tokens=2)
    with running(serving_of({"pair": pair})) as url:
        refused = http.post(f"{url}/v1/chat/completions", json={"messages": TURNS})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "no_chat_template"
    assert "bare of pair has no chat template" in refused.json()["error"]["message"]
    with running(serving_of({"pair": pair}, plain_chat=True)) as url:
        answer = http.post(f"{url}/v1/chat/completions", json={"messages": TURNS, "max_tokens": 4, "seed": 1}).json()
    assert [name.split("/")[-1] for name in answer["softmeet"]["plain_chat"]] == ["bare"]
    plain = "system: the\nuser: he t\u00e9\nassistant:"
    assert (
        pair.model.readers[1].spelling.spelled(chat_of(pair.model).own_prompts([TURNS, TURNS])[1]).decode().strip()
        == plain
    )


def test_over_tokens_members_share_the_prompt(folders):
    duo = tiny_ensemble("gpt2", "llama", template=TEMPLATE)
    assert chat_of(duo.model).shared_prompt(TURNS) == duo.tokenizer("s:the!u:he t\u00e9!a:")["input_ids"]
    assert isinstance(duo.generate(TURNS, max_new_tokens=2), str)
    names, ours = ["a", "b"], [AutoTokenizer.from_pretrained(folders[0]) for _ in range(2)]
    ours[1].chat_template = OTHER
    assert ChatTemplates(names, ours).shared_prompt(TURNS) is None
    ours[1].chat_template = None
    assert ChatTemplates(names, ours).shared_prompt(TURNS) == ChatTemplates(names[:1], ours[:1]).own_prompts([TURNS])[0]
    ours[0].chat_template = None
    with pytest.raises(InvalidInputError, match="a, b have no chat template"):
        ChatTemplates(names, ours).shared_prompt(TURNS)
    assert ChatTemplates(names, ours, plain=True).plainly == names
    with pytest.raises(InvalidInputError, match="refuses these messages: no bad"):
        duo.generate([{"role": "user", "content": "bad"}], max_new_tokens=2)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 // 0 }}", "zero"), ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' + 1 }}", "concatenate"), ("{{ 'a ' * 10 ** 6 }}", "2,000,000 characters"),
        ("{{ 'a' * 10 ** 15 }}", "MemoryError"), ("{% for %}", "Expected"),
    ],
)  # fmt: skip
def test_whatever_a_template_does_is_an_error_of_softmeets(template, said, folders):
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokenizer.chat_template = template
    with pytest.raises(InvalidInputError, match=f"the chat template refuses these messages: .*{said}"):
        ChatTemplates(["a"], [tokenizer]).own_prompts([TURNS])


def test_a_template_that_never_ends_is_ended(folders, monkeypatch):
    monkeypatch.setattr(chat_module, "_SECONDS", 0.3)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    loops = "".join(f"{{% for x{k} in range(99999) %}}" for k in range(4))
    tokenizer.chat_template = loops + "{% endfor %}" * 4
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="the chat template refuses these messages: it takes too long"):
            ChatTemplates(["a"], [tokenizer]).own_prompts([TURNS])


@pytest.mark.slow
def test_a_step_of_a_template_that_never_ends_ends_the_process(folders):
    """Nothing else could run meanwhile, no other client and no signal."""
    code = (
        "import sys; from transformers import AutoTokenizer; from softmeet.hf import chat; chat._SECONDS = 0.5; "
        "own = AutoTokenizer.from_pretrained(sys.argv[1]); turns = [{'role': 'user', 'content': 'x'}]; "
        "chat.ChatTemplates('ab', [own, own]).own_prompts([turns] * 2); import time; time.sleep(1.5); "
        "print('goes on', flush=True); own.chat_template = '{{ (10 ** (10 ** 9)) | length }}'; "
        "chat.ChatTemplates(['a'], [own]).own_prompts([turns])"
    )
    done = subprocess.run([sys.executable, "-c", code, folders[0]], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "goes on\n"), done.stderr
    assert "Timeout" in done.stderr


def test_the_command_chats(folders):
    command = ["generate", "he t\u00e9", "-m", str(folders[0]), "-m", str(folders[1]), "--rule", "prob-mean"]
    command += ["--vocabulary", "bytes", "--seed", "4", "--max-new-tokens", "16"]
    done = CliRunner().invoke(commands, [*command, "--chat", "--system", "the", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])["completions"][0]
    ensemble = Ensemble.from_pretrained(folders, "prob-mean", vocabulary="bytes")
    assert found["text"] == ensemble.generate(TURNS, seed=4, max_new_tokens=16)
    for wrong, said in (
        (["--system", "the"], "say --chat as well"),
        (["--chat", "--prompt-weights"], "leave it out, or --chat"),
    ):
        done = CliRunner().invoke(commands, [*command, *wrong])
        assert isinstance(done.exception, InvalidInputError | SystemExit)
        assert said in done.output + str(done.exception)


@pytest.mark.parametrize("member", [name for name in zoo.known() if "/" in name])
def test_the_bundled_members_have_the_plain_template_and_say_so(member):
    chat = ChatTemplates([member], [AutoTokenizer.from_pretrained(zoo.locate(member))])
    assert chat.plainly == [member]
    assert not chat.missing
