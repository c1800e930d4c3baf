"""A member's line of text, what members of one base share, and what is said of lines that name nothing."""

import json
import logging

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from softmeet import Ensemble, Member
from softmeet.errors import CheckpointError, InvalidInputError, SoftmeetError
from softmeet.hf.plan import plan
from softmeet.members import adapters
from softmeet.members import huggingface as loading
from softmeet.members.member import short, titles

PROMPT = "a long tale. "
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)
FREE = WORDS.filter(lambda text: not text.endswith((".txt", ".md", ".jinja")))


@given(
    st.sampled_from(["org/model", "a+b/c", "m@x/y/z", "/a/b.gguf"]),
    st.dictionaries(
        st.sampled_from(["subfolder", "file", "adapter", "prompt", "device", "dtype", "quantization", "name"]), FREE
    ),
)
def test_a_line_is_read_as_it_was_written(source, fields):
    member = Member(source, **fields)
    assert Member.parse(str(member)) == member
    assert Member.of(str(member)) == Member.of(member) == Member.of({"source": str(Member(source)), **fields})


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("org/model", {"source": "org/model"}),
        ("org/model@v2", {"source": "org/model", "revision": "v2"}),
        ("org/model@v2/q4.gguf", {"source": "org/model", "revision": "v2", "file": "q4.gguf"}),
        ("a++b+name=c++++d", {"source": "a+b", "name": "c++d"}),
        ("m+prompt=Say 1 ++ 1 = 2", {"source": "m", "prompt": "Say 1 + 1 = 2"}),
        ("m@main+adapter=org/lora@v1+dtype=bfloat16", {
            "source": "m", "revision": "main", "adapter": "org/lora@v1", "dtype": "bfloat16",
        }),
    ],
)  # fmt: skip
def test_lines(line, fields):
    assert Member.parse(line) == Member(**fields)
    assert Member.parse(str(Member.parse(line))) == Member(**fields)


def test_a_prompt_may_be_in_a_file(tmp_path):
    (tmp_path / "expert.txt").write_text(PROMPT)
    member = Member.parse(f"wide/gpt2+prompt={tmp_path / 'expert.txt'}")
    assert (member.prompt, member.title) == (PROMPT, "wide/gpt2+expert")
    assert Member("wide/gpt2", prompt=str(tmp_path / "expert.txt")) == member
    assert Member.parse(str(member)) == member
    assert short(str(member)) == "wide/gpt2+expert"


def test_a_path_with_a_plus_or_an_at_is_a_path_where_it_exists(tmp_path):
    folder = tmp_path / "c++@home"
    folder.mkdir()
    assert Member.parse(str(folder)).source == str(folder)
    assert Member.parse(str(Member.parse(str(folder)))).source == str(folder)


def test_a_home_folder_is_one_behind_a_name_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Member.parse("~/a.gguf+context=8").source == str(tmp_path / "a.gguf")


def test_names_to_show_are_distinct():
    assert titles(["a/b", "a/b", "x/a/b+name=c", "a/b+adapter=d/e+quantization=int8"]) == [
        "a/b", "a/b#2", "c", "a/b+d/e+int8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "expected a member's name"),
        ("+prompt=x", "expected a member's source"),
        ("m+adaptor=x", "got 'adaptor=x' in .* did you mean adapter"),
        ("m+x", "with the keys subfolder, file, .*got 'x'.*write \\+\\+ for a plus"),
        ("m+name=", "got 'name='"),
        ("m+name=a+name=b", "each key of a member once, got name twice"),
        ("m+prompt=absent.txt", "cannot read the prompt of m, the file absent.txt: No such file"),
        ({"prompt": "x"}, "got no source"),
        ({"source": "m", "propmt": "x"}, "got 'propmt'"),
        ({"source": "m", "dtype": 3}, "got 'dtype'"),
    ],
)
def test_what_is_no_member(line, said):
    with pytest.raises(InvalidInputError, match=said):
        Member.of(line)
    with pytest.raises(InvalidInputError, match=said):
        Ensemble.from_pretrained([line])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    tiny.save(folder / "base", "llama", seed=0)
    tiny.save(folder / "other", "gpt2", seed=1)
    tiny.save_lora(folder / "lora", folder / "base", 0)
    return folder


def weights(model):
    return {tensor.data_ptr() for tensor in model.parameters()}


def test_members_of_one_base_are_loaded_once(made, monkeypatch):
    base = str(made / "base")
    seen = []
    monkeypatch.setattr(loading, "_load", lambda *given, _load=loading._load: seen.append(given[0]) or _load(*given))
    lines = [base, f"{base}+prompt=so", f"{base}+adapter={made / 'lora'}", f"{base}+adapter={made / 'lora'}+prompt=so"]
    shown = []
    ensemble = Ensemble.from_pretrained(lines, "logit-mean", on_progress=shown.append)
    one, same, tuned, again = ensemble.model.members
    assert seen == [Member(base)]
    assert one is same
    assert tuned is again
    assert tuned is not one
    assert weights(one) < weights(tuned)
    assert sum(p.numel() for p in ensemble.model.parameters()) < 1.1 * sum(p.numel() for p in one.parameters())
    assert shown == [base, f"{base}+adapter={made / 'lora'}"]
    assert len(Ensemble.from_pretrained([base, f"{base}+dtype=bfloat16"], "logit-mean").model.members) == 2


def test_a_plan_counts_shared_weights_once(made):
    base = str(made / "base")
    lines = [base, f"{base}+prompt=so", f"{base}+adapter={made / 'lora'}"]
    parts = [(part.owner, part.what, part.bytes) for part in plan(lines).parts if part.owner != "solver"]
    assert [what for _, what, _ in parts] == ["body", "head", "cache", "cache", "adapter", "cache"]
    ensemble = Ensemble.from_pretrained(lines, "logit-mean")
    planned = sum(size for _, what, size in parts if what != "cache")
    assert planned == pytest.approx(sum(p.nbytes for p in ensemble.model.parameters()), rel=0.05)


def test_a_cast_reaches_all_that_is_shared(made):
    base = str(made / "base")
    lines = [base, f"{base}+prompt=so", f"{base}+adapter={made / 'lora'}"]
    ensemble = Ensemble.from_pretrained(lines, "logit-mean")
    before = ensemble.generate("the fox", max_new_tokens=4, do_sample=False)
    ensemble.model.double()
    assert {p.dtype for p in ensemble.model.parameters()} == {torch.float64}
    assert ensemble.generate("the fox", max_new_tokens=4, do_sample=False) == before
    assert weights(ensemble.model.members[0]) < weights(ensemble.model.members[2])


def test_a_prompt_is_read_once(made):
    """Its keys and values are kept: a second text runs its own tokens alone, from where they begin to differ."""
    ensemble = Ensemble.from_pretrained([f"{made / 'base'}+prompt={PROMPT}"], "logit-mean")
    ran = []
    model = ensemble.model.members[0].model
    model.register_forward_pre_hook(lambda _, __, given: ran.append(given["input_ids"].numel()), with_kwargs=True)
    ensemble.generate("the fox", max_new_tokens=1, do_sample=False)
    ensemble.generate("the dog", max_new_tokens=1, do_sample=False)
    assert ran == [len(PROMPT) + len("the fox"), len("dog")]


def test_prompts_of_one_model_are_rows_of_one_batch(made):
    ensemble = Ensemble.from_pretrained([f"{made / 'base'}+prompt={text}" for text in "abcd"], "logit-mean")
    calls = []
    model = ensemble.model.members[0].model
    model.register_forward_pre_hook(lambda _, __, given: calls.append(len(given["input_ids"])), with_kwargs=True)
    ensemble.generate(["the", "fox"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert calls == [8, 8, 8]


BAD = {
    "adapter of another base": ("{0}/other+adapter={0}/lora", CheckpointError, "it is of another base than"),
    "no adapter": ("{0}/base+adapter={0}/base", CheckpointError, "it has no adapter_config.json"),
    "adapter that is not there": ("{0}/base+adapter={0}/lura", CheckpointError, "no such folder: did you mean .*lora"),
    "adapter as a model": ("{0}/lora", CheckpointError, "it is an adapter: name its base"),
    "prompt that fills the context": (
        "{0}/base+prompt=" + "long " * 20, InvalidInputError, "shorter than its context of 64 tokens, got 100",
    ),
    "no subfolder": ("{0}/base+subfolder=inner", CheckpointError, "there is no such folder"),
    "file that is not there": ("{0}/base+file=x.gguf", CheckpointError, "there is no such file"),
    "unknown dtype": ("{0}/base+dtype=int3", InvalidInputError, "expected a dtype of float32"),
    "unknown device": ("{0}/base+device=nowhere", InvalidInputError, "expected a device such as cpu"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_members_are_refused_before_anything_is_loaded(bad, made, monkeypatch):
    line, error, said = BAD[bad]
    monkeypatch.setattr(loading, "_load", lambda *given: pytest.fail("it was loaded"))
    with pytest.raises(error, match=said) as caught:
        Ensemble.from_pretrained([line.format(made)], "logit-mean")
    assert "\n" not in str(caught.value)


def test_an_adapter_without_peft_says_what_to_install(made, monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"needs one more package, peft: .*install .*adapters"):
        Ensemble.from_pretrained([f"{made / 'base'}+adapter={made / 'lora'}"])


def test_adapters_of_other_kinds_and_damaged_ones_are_refused(made, tmp_path):
    for name, change in (("kind", {"peft_type": "PREFIX_TUNING"}), ("damaged", None)):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((made / "lora" / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | (change or {})))
        whole = (made / "lora" / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(whole if change else whole[:50])
        said = "puts vectors before the text" if change else "its files are damaged"
        with pytest.raises(CheckpointError, match=said):
            Ensemble.from_pretrained([f"{made / 'base'}+adapter={folder}"])


def test_an_adapter_made_for_another_name_is_a_warning(made, tmp_path, caplog):
    tiny.save(tmp_path / "renamed", "llama", seed=0)
    with caplog.at_level(logging.WARNING, "softmeet"):
        Ensemble.from_pretrained([f"{tmp_path / 'renamed'}+adapter={made / 'lora'}"])
    assert "was made for" in caplog.text


def test_a_context_that_own_prompts_fill_ends_the_text(made):
    """The context has 64 tokens; a prompt of 50 leaves 14, of which the text takes seven."""
    ensemble = Ensemble.from_pretrained([str(made / "other"), f"{made / 'base'}+prompt={'x' * 50}"], "logit-mean")
    ids = ensemble.tokenizer("the fox", return_tensors="pt")["input_ids"]
    with pytest.warns(UserWarning, match="cut to 14"):
        text = ensemble.generate("the fox", max_new_tokens=60, min_new_tokens=7, do_sample=False)
    assert len(ensemble.tokenizer(text)["input_ids"]) + ids.shape[1] <= 14
    with pytest.raises(InvalidInputError, match="shorter than its context, got 72 tokens"):
        ensemble.generate("a fox that is too long")


def test_every_error_is_one_of_softmeets(made):
    for line in ("\0", "a\0b+prompt=\0", "x" * 300, "x" * 5000, "wide+nothing"):
        with pytest.raises(SoftmeetError):
            Ensemble.from_pretrained([line])
