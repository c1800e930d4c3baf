"""Ensembles over bytes: members with different tokenizers, through generate, forward, checkpoints and refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.engine.processors import following
from softmeet.errors import InvalidInputError, TraceError, UnsupportedHeadError, VocabularyMismatchError
from softmeet.evaluation.choices import parse_choices
from softmeet.evaluation.documents import Document
from softmeet.evaluation.fit import Options, fit
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.trace import Trace, record
from softmeet.hf import EnsembleConfig, EnsembleForCausalLM
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM
from softmeet.hf.decoding import Drafting
from softmeet.members.member import short
from softmeet.readers.byte_tokenizer import byte_tokenizer
from softmeet.readers.bytes.next_tokens import END, SYMBOLS

GREEDY = {"max_bytes": 3, "do_sample": False}
PROMPTS = ["the", "h", "\u00e9t"]


def test_a_rule_that_reads_heads_is_refused_before_anything_is_loaded():
    with pytest.raises(UnsupportedHeadError, match=r"rule meet .* choose logit-mean or prob-mean or power-mean"):
        Ensemble.from_pretrained(["nowhere/a", "nowhere/b"], "meet", vocabulary="bytes")


@pytest.mark.parametrize("rule", ["prob-mean", "logit-mean", "power-mean"])
def test_the_distribution_is_the_average_of_the_members(folders, rule):
    """At every byte, of a text that is read at once and of one that is read byte by byte."""
    ours = Ensemble.from_pretrained(
        folders, f"{rule}:weights=0.7/0.3", vocabulary="bytes", prune=0.0, dtype=torch.float64
    )
    text = b"the h\xc3\xa9"
    p = np.stack([reader.score(text)[1] for reader in ours.model.readers])
    if rule == "prob-mean":
        expected = np.log(0.7 * np.exp(p[0]) + 0.3 * np.exp(p[1]))
    elif rule == "power-mean":
        mean = (0.7 * np.exp(p[0] / 2) + 0.3 * np.exp(p[1] / 2)) ** 2
        expected = np.log(mean / mean.sum(-1, keepdims=True))
    else:
        expected = torch.from_numpy(0.7 * p[0] + 0.3 * p[1]).log_softmax(-1).numpy()
    ids = torch.tensor([list(text)])
    with torch.inference_mode():
        at_once = ours.model(input_ids=ids, use_cache=False).logits[0]
        cache, one_by_one = None, []
        for k in range(ids.shape[1]):
            out = ours.model(input_ids=ids[:, k : k + 1], cache=cache, use_cache=True)
            cache = out.cache
            one_by_one.append(out.logits[0, -1])
    assert np.abs(np.exp(at_once.numpy()) - np.exp(expected[1:])).sum(-1).max() < 1e-9
    assert np.abs(np.exp(torch.stack(one_by_one).numpy()) - np.exp(expected[1:])).sum(-1).max() < 1e-9


def test_what_is_generated_is_utf8(pruned):
    out = pruned.model.generate(
        torch.tensor([list(b"the \xf0\x9f")]), max_new_tokens=40, do_sample=True, temperature=3.0, top_k=0
    )
    text = bytes(symbol for symbol in out[0].tolist() if symbol != END)
    text.decode() if out[0, -1] == END else text.decode(errors="ignore")
    # Whatever was cut off at the end is the beginning of a character.
    assert not text.decode(errors="replace")[:-1].count("\ufffd")


def test_which_bytes_may_follow(ensemble):
    """Of all strings of up to four bytes, those that Python can decode, or go on to decode."""
    (forbid,), zeros = following(ensemble.model.alphabet), torch.zeros(1, SYMBOLS)
    for character in ("a", "\u00e9", "\u20ac", "\U0001f642", "\u0800", "\ud7ff", "\U0010ffff"):
        text = character.encode()
        for k, byte in enumerate(text):
            allowed = forbid(torch.tensor([list(text[:k])], dtype=torch.int64), zeros)[0].isfinite()
            assert allowed[byte]
            assert allowed[END] == (k == 0)
    for text, byte in ((b"", 0x80), (b"", 0xC0), (b"", 0xF5), (b"\xe0", 0x80), (b"\xed", 0xA0), (b"\xf4", 0x90)):
        assert not forbid(torch.tensor([list(text)], dtype=torch.int64), zeros)[0].isfinite()[byte]


def test_it_is_saved_and_loaded(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path / "saved")
    again = Ensemble.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    expected = ensemble.generate(PROMPTS, **GREEDY)
    assert again.generate(PROMPTS, **GREEDY) == expected
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = tokenizer("the", return_tensors="pt")
    out = model.generate(**ids, **GREEDY)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == expected[0]
    assert tokenizer("<|end|>")["input_ids"] == list(b"<|end|>")


def test_it_can_be_made_of_its_configuration_alone(folders):
    config = EnsembleConfig(folders, "prob-mean", vocabulary="bytes")
    model = tf.AutoModelForCausalLM.from_config(config)
    assert type(model) is ByteEnsembleForCausalLM
    assert [reader.spelling.name for reader in model.readers] == list(map(str, folders))
    text = torch.tensor([list(b"the")])
    assert model.generate(text, max_bytes=3, min_new_tokens=3, do_sample=False).shape == (1, 6)
    with pytest.raises(InvalidInputError, match="expected a configuration with vocabulary='tokens', got 'bytes'"):
        EnsembleForCausalLM(config)
    with pytest.raises(VocabularyMismatchError, match="vocabulary='bytes'"):
        tf.AutoModelForCausalLM.from_config(EnsembleConfig(folders))


def test_the_tokenizer_of_bytes_takes_text_as_it_is():
    tokenizer = byte_tokenizer()
    for text in ("a b  c\n", "\u05e9\u05dc \U0001f642\u200d", "<|end|>", "e\u0301"):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_text_past_a_members_context_is_refused_by_name(pruned, folders):
    with pytest.raises(InvalidInputError, match=f"at most 128 tokens, the context of {folders[0]}"):
        pruned.generate("x" * 140, **GREEDY)


def test_what_bytes_are_not_there_for_says_so(pruned, folders, tmp_path):
    documents = [Document("a", "the other the")]
    refusing = {"evaluation does": lambda: list(pruned.positions("the other", 5))}
    for what, use in refusing.items():
        with pytest.raises(InvalidInputError, match=f"{what} .*over bytes"):
            use()
    for use in (
        lambda: evaluate_text(pruned, documents, parse_choices(["meet"], 2)),
        lambda: fit(pruned, observe_text(pruned, documents), Options(rules=("max-entropy",))),
    ):
        with pytest.raises(UnsupportedHeadError, match="bytes have none: choose logit-mean or prob-mean or power-mean"):
            use()


def test_bytes_are_chosen_where_tokenizers_differ_and_said(folders, caplog):
    with caplog.at_level("WARNING", "softmeet"):
        differing = Ensemble.from_pretrained(folders)
    assert differing.model.config.vocabulary == "bytes"
    assert differing.model.config.rule == "logit-mean"
    (record,) = (record for record in caplog.records if record.name == "softmeet")
    first, second = map(short, folders)
    assert record.message == (
        f"mixed byte by byte, as {first} and {second} have different tokens; limits on tokens count those of {first}"
    )
    caplog.clear()
    same = Ensemble.from_pretrained([folders[0], folders[0]])
    assert same.model.config.vocabulary == "tokens"
    assert same.model.config.rule == "meet"
    assert not caplog.records
    with pytest.raises(UnsupportedHeadError, match="the rule meet reads the rows of softmax matrices"):
        Ensemble.from_pretrained(folders, "meet")


def lines(folder, count=8):
    """Documents, each a file, as a pattern."""
    for k in range(count):
        (folder / f"{k:02d}.txt").write_text(f"the {k}th \u00e9t\u00e9 ")
    return folder / "*.txt"


def command(*arguments):
    found = CliRunner().invoke(commands, list(map(str, arguments)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_evaluation_is_what_members_say_of_every_byte(folders, tmp_path):
    asked = ["evaluate", *tiny.each("-m", folders), "--text", lines(tmp_path), "--json", tmp_path / "found.json"]
    command(*asked, "--rule", "prob-mean:weights=0.3/0.7")
    facts = json.loads((tmp_path / "found.json").read_text())
    texts = [path.read_bytes() for path in sorted(tmp_path.glob("*.txt"))]
    assert (facts["vocabulary"], facts["documents"]) == ("bytes", 8)
    assert facts["bytes"] == facts["tokens"] == sum(map(len, texts)) - 8
    ours = Ensemble.from_pretrained(folders)
    nats, costs = np.zeros(2), np.zeros((2, 3))
    for text in texts:
        for i, reader in enumerate(ours.model.readers):
            # The last byte is predicted, and not read.
            reading, log_probs, _ = reader.score(text[:-1])
            nats[i] -= log_probs[range(1, len(text)), list(text[1:])].sum()
            costs[i] += reading.work.dropped, reading.work.calls, reading.work.tokens
    for i, own in enumerate(facts["members"].values()):
        assert own["bits_per_byte"] == pytest.approx(nats[i] / facts["bytes"] / math.log(2), rel=1e-9)
        found = own["dropped"], own["forward_steps"], own["tokens_run"]
        assert found == pytest.approx((costs[i] / facts["bytes"]).tolist(), rel=1e-6)
    assert {"logit-mean", "prob-mean"} < facts["rules"].keys()
    assert all("forward_steps" not in own for own in facts["rules"].values())


def test_inspect_lists_no_more_than_there_is_and_begins_where_the_text_does(pruned, folders):
    """SmolLM2 has no token for some bytes; here the first member has none for NUL."""
    whole = pruned.inspect("the", 10_000)[0]
    assert len(whole.top) == 257
    assert [len(own) for own in whole.member_top] == [head.v for head in pruned.model.member_heads]
    first, *_ = pruned.model.readers
    blind = first.spelling
    first.spelling = replace(blind, unwritable=b"\0")
    try:
        found = pruned.inspect("\0the", 3)
    finally:
        first.spelling = blind
    assert "".join(group.text for group in found) == "\0the"
    assert found[0].member_top[0] == []
    assert len(found[0].member_top[1]) == 3


def test_generate_says_what_bytes_cost(folders):
    asked = ["generate", "the other", *tiny.each("-m", folders), "--seed", 1, "--max-new-bytes", 8]
    facts = json.loads(command(*asked, "--json"))
    assert (facts["vocabulary"], facts["tokens"]) == ("bytes", 8)
    ours = Ensemble.from_pretrained(folders)
    before = ours.model.spent
    ours.generate("the other", seed=1, do_sample=True, top_k=0, max_bytes=8)
    for own, old, new in zip(facts["members"], before, ours.model.spent, strict=True):
        assert own["width"] > 1
        assert own["forward_steps"] == (new.calls - old.calls) / 8 > 0
        assert own["tokens_run"] == (new.tokens - old.tokens) / 8 >= own["forward_steps"]
        assert own["dropped"] == pytest.approx((new.dropped - old.dropped) / 8)
    shown = CliRunner().invoke(commands, [*map(str, asked), "--summary"]).output
    assert "over bytes" in shown
    assert "calls" in shown


@pytest.mark.parametrize(("given", "drafts"), [({}, False), ({"speculate": "auto"}, True), ({"speculate": 2}, True)])
def test_bytes_are_drafted_where_that_is_asked_for(folders, monkeypatch, given, drafts):
    asked, made = [], Drafting.draft
    monkeypatch.setattr(Drafting, "draft", lambda *own: asked.append(own) or made(*own))
    Ensemble.from_pretrained(folders).generate("the other", max_bytes=20, do_sample=False, **given)
    assert bool(asked) == drafts


def test_a_trace_and_a_fit_give_what_the_text_gives(folders, tmp_path):
    members, source = tiny.each("-m", folders), lines(tmp_path)
    command("trace", tmp_path / "trace", *members, "--text", source)
    found = []
    for k, given in enumerate((["--text", source], ["--trace", tmp_path / "trace"])):
        file = tmp_path / f"{k}.json"
        command("evaluate", *members, "--rule", "logit-mean", *given, "--json", file)
        found.append(json.loads(file.read_text())["rules"]["logit-mean"]["bits_per_byte"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    with pytest.raises(TraceError, match=r"was made over bytes \(prune 0.001\), but these .* over bytes \(prune 0.5\)"):
        command("evaluate", *members, "--trace", tmp_path / "trace", "--prune", 0.5)
    with pytest.raises(TraceError, match="with other prefixes"):
        Trace.open(tmp_path / "trace").require(Ensemble.from_pretrained(folders, prune=0.001, prefixes=[[1], None]))
    out = tmp_path / "fitted"
    asked = ["fit", "--out", out, *members, "--trace", tmp_path / "trace", "--json", tmp_path / "fit.json"]
    command(*asked, "--evaluations", 2)
    facts = json.loads((tmp_path / "fit.json").read_text())
    averages = {"logit-mean", "prob-mean", "power-mean"}
    assert {Path(name).name for name in facts["candidates"]} == {"gpt2", "llama", *averages}
    assert facts["vocabulary"] == "bytes"
    card = (out / "README.md").read_text()
    assert "| nats/byte |" in card
    assert " bytes, chosen on" in card
    again = Ensemble.from_pretrained(out)
    assert (again.model.config.vocabulary, again.model.config.prune) == ("bytes", 0.001)
    assert again.model.config.weights == pytest.approx(facts["weights"])
    assert len(again.generate("the", **GREEDY).encode()) == GREEDY["max_bytes"]


def test_a_trace_in_half_precision_says_what_it_costs(pruned, tmp_path):
    documents = [Document("a", "the other there, he threw the th\u00e9"), Document("b", "he the")]
    whole = observe_text(pruned, documents)
    half = record(pruned, documents, tmp_path / "half", dtype="float16")
    found = half.read()
    for one, other in zip(whole.costs, found.costs, strict=True):
        assert one[:, 1].sum() > 0
        assert torch.allclose(one, other, rtol=1e-3)
    errors = torch.stack([
        (one.log_softmax(-1) - other.log_softmax(-1)).gather(-1, whole.targets[:, None]).abs()
        for one, other in zip(whole.hidden, found.hidden, strict=True)
    ])  # fmt: skip
    assert 0 < errors.max() < 0.02
    assert half.float16_error() == pytest.approx(
        {"largest": errors.max().item(), "mean": errors.mean().item()}, rel=1e-3
    )


def test_check_says_what_is_shared_and_what_it_costs(folders, tmp_path):
    text = "the other there, he threw"
    (tmp_path / "a.txt").write_text(text)
    asked = ["check", *tiny.each("-m", folders), "--text", tmp_path / "a.txt"]
    facts = json.loads(command(*asked, "--json"))
    one, other = (reader.spelling for reader in Ensemble.from_pretrained(folders).model.readers)
    (pair,) = facts["pairs"]
    assert pair["shared_tokens"] == len(set(one.words) & set(other.words)) > 0
    assert all(0 < share <= 1 for share in pair["shared_boundaries"])
    for member, spelling in zip(facts["members"], (one, other), strict=True):
        assert member["own_tokens_per_byte"] == len(spelling.encode(text.encode())) / len(text)
        assert member["tokens_run_per_byte"] >= member["own_tokens_per_byte"]
    assert "over bytes, by logit-mean or prob-mean or power-mean." in facts["notes"][0]
    assert "tokens in common" in command(*asked)
    # Longer than a context of 128 tokens.
    (tmp_path / "long.txt").write_text("the other there, " * 40)
    long = ["check", *tiny.each("-m", folders), "--text", tmp_path / "long.txt", "--json"]
    assert all(m["bits_per_byte"] > 0 for m in json.loads(command(*long))["members"])
    forced = ["check", "-m", folders[0], "-m", folders[0], "--vocabulary", "bytes", "--json"]
    assert "--vocabulary tokens" in json.loads(command(*forced))["notes"][0]


def test_inspect_reports_between_places_where_all_members_cut(folders, pruned):
    text = "the \u00e9t other"
    found, symbols = pruned.inspect(text, 3), list(text.encode())
    assert "".join(report.text for report in found) == text
    assert 1 < len(found) < len(text)
    for i, reader in enumerate(pruned.model.readers):
        whole = reader.score(bytes(symbols))[1][range(len(symbols)), symbols].sum()
        assert sum(report.member_log_probs[i] for report in found) == pytest.approx(whole, abs=1e-9)
        # What a member expects at the beginning are the most probable of its own tokens there.
        with torch.inference_mode():
            log_p = reader.model(torch.tensor([reader.prefix])).logits[0, -1].log_softmax(-1)
        assert [x for _, x in found[0].member_top[i]] == pytest.approx(log_p.topk(3).values.tolist())
    facts = json.loads(command("inspect", *tiny.each("-m", folders), text, "--json"))
    assert facts["first"] == ""
    assert "".join(token["text"] for token in facts["tokens"]) == text
    assert facts["nats"] == pytest.approx(-sum(token["log_prob"] for token in facts["tokens"]) / len(symbols))


def begun_with(reader, text):
    """A prompt in a member's own tokens, behind those that begin a text."""
    return [*reader.spelling.start, *reader.spelling.encode(text)]


def test_members_begin_after_prompts_of_their_own(ensemble, folders, tmp_path):
    """Of every row, and of all texts: cached or not, in a batch or alone, in beams, saved."""
    readers = ensemble.model.readers
    prefixes = [[begun_with(readers[0], b"he t"), None], [None, begun_with(readers[1], b"there ")]]
    inputs = ensemble.tokenizer(PROMPTS[:2], return_tensors="pt", padding=True)
    found = ensemble.model(**inputs, prefixes=prefixes).logits[:, -1]
    for k, own in enumerate(prefixes):
        expected = [
            reader.log_probs([reader.begin(PROMPTS[k].encode(), prefix)])[0]
            for reader, prefix in zip(readers, own, strict=True)
        ]
        mean = torch.stack(expected).mean(0).log_softmax(-1)
        assert torch.allclose(found[k].double(), mean, atol=1e-5)
    assert not torch.allclose(found, ensemble.model(**inputs).logits[:, -1], atol=1e-2)
    for options in (GREEDY, GREEDY | {"num_beams": 2}):
        together = ensemble.generate(PROMPTS[:2], prefixes=prefixes, **options)
        alone = [
            ensemble.generate(prompt, prefixes=[own], **options)
            for prompt, own in zip(PROMPTS[:2], prefixes, strict=True)
        ]
        assert together == alone
        if "num_beams" not in options:
            greedy = alone[0]
            assert together == ensemble.generate(PROMPTS[:2], prefixes=prefixes, use_cache=False, **options)
    how = {"vocabulary": "bytes", "prune": 0.0, "dtype": torch.float64, "weights": [1, 1]}
    fixed = Ensemble.from_pretrained(folders, **how, prefixes=prefixes[0])
    assert fixed.generate(PROMPTS[0], **GREEDY) == greedy
    fixed.save_pretrained(tmp_path / "fixed")
    again = Ensemble.from_pretrained(tmp_path / "fixed", dtype=torch.float64)
    assert again.model.config.prefixes == prefixes[0]
    assert again.generate(PROMPTS[0], **GREEDY) == greedy


def test_a_prefix_is_read_once(pruned):
    reader, asked = pruned.model.readers[0], []
    note = lambda module, given, options: asked.append(options["input_ids"].shape[1])  # noqa: E731
    hook = reader.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    prefix = begun_with(reader, b"the other there he " * 3)
    pruned.generate(["the", "he "], prefixes=[[prefix, None]] * 2, **GREEDY)
    hook.remove()
    assert asked.count(len(prefix)) == 1
    assert sum(count >= len(prefix) for count in asked) == 1


def test_prefixes_that_do_not_fit_are_refused(pruned, folders):
    with pytest.raises(InvalidInputError, match=r"expected 2 prefixes, one per member, got \["):
        Ensemble.from_pretrained(folders, prefixes=[[1]])
    for wrong in ([99_999], [-1], [True], ["x"]):
        said = f"expected a prefix of token ids of {folders[0]}, .* got {wrong[0]!r}"
        with pytest.raises(InvalidInputError, match=said):
            Ensemble.from_pretrained([folders[0], folders[0]], prefixes=[wrong, None])
    shapes = [[[1], None, None]], [[[1]]], [[1], None, None], [[1]], [["x", None]], [None]
    for said, every in (
        ("expected prefixes for each of 1 prompts, got 2", [[[None, None]] * 2]),
        ("a prefix of at least one token", [[[[], None]]]),
        ("token ids or None for each of 2 members", shapes),
        (
            f"token ids of {folders[0]}, from 0 to .*got (99999|-1|True)",
            [[[[own], None]] for own in (99_999, -1, True)],
        ),
    ):
        for wrong in every:
            with pytest.raises(InvalidInputError, match=said):
                pruned.generate("the", prefixes=wrong, **GREEDY)
    tokens = Ensemble.from_pretrained([folders[0]])
    with pytest.raises(InvalidInputError, match="as over tokens members share"):
        tokens.model(input_ids=torch.tensor([[5]]), prefixes=[[None]])


@pytest.mark.parametrize("rule", ["logit-mean", "prob-mean"])
def test_a_text_ends_where_a_members_context_is_full(folders, rule, caplog):
    """Of 128 tokens, whatever the other member has room for; what was generated until then is kept."""
    ours = Ensemble.from_pretrained(folders, rule)
    found = ours.generate(["x" * 120, "the"], max_new_tokens=24, do_sample=True, seed=3, top_k=50)
    assert 0 < len(found[0].encode()) < 20
    assert len(found[1].encode()) > 20
    streamed = ours.stream_with_disagreement("x" * 120, max_new_tokens=24, do_sample=True, seed=3, top_k=50)
    assert "".join(piece for piece, _ in streamed) == found[0]
    record, *others = (one for one in caplog.records if "is full" in one.message)
    assert len(others) <= 3  # one for each member and text
    assert str(folders[0]) in record.message or str(folders[1]) in record.message
    with pytest.raises(InvalidInputError, match="lower min_new_tokens"):
        ours.generate("x" * 120, min_new_tokens=40, max_new_tokens=40, do_sample=True, seed=1)


def test_without_a_length_a_text_may_fill_the_shortest_context(folders):
    """Of 128 tokens, where transformers' own default ends it after 20 symbols."""
    found = Ensemble.from_pretrained(folders, "prob-mean").generate("the", seed=2, top_k=50)
    assert len(found.encode()) > 100


def test_all_tokenizations_are_for_a_few_words(ensemble):
    with pytest.raises(InvalidInputError, match="more than 2,048 here, is for a few words: give a prune above 0"):
        ensemble.generate("the other there", max_new_tokens=1)


def test_the_next_byte_is_shown_as_a_byte(pruned):
    shown = dict(pruned.next_token("the", top=257).top)
    assert len(shown) == 257
    assert {"t", "\\xC3", "<|end|>"} < shown.keys()


def test_an_empty_prompt_on_the_command_line(folders):
    asked = ["generate", "", *tiny.each("-m", folders), "--max-new-tokens", 4, "--seed", 1]
    ours = Ensemble.from_pretrained(folders)
    assert command(*asked) == ours.generate("", max_new_tokens=4, do_sample=True, top_k=0, seed=1) + "\n"
    with pytest.raises(InvalidInputError, match="a text of at least one byte"):
        ours.inspect("")
    with pytest.raises(InvalidInputError, match="a prompt of at least one token"):
        command("generate", "", "-m", folders[0])


def test_a_pipeline_knows_the_class(pruned, caplog):
    pipeline = tf.pipeline("text-generation", model=pruned.model, tokenizer=pruned.tokenizer)
    assert pipeline("the", **GREEDY)[0]["generated_text"] == "the" + pruned.generate("the", **GREEDY)
    assert not [record for record in caplog.records if "not supported" in record.message]


def test_an_empty_prompt_begins_a_text(ensemble):
    found = ensemble.model(input_ids=torch.tensor([[END]])).logits[0, -1].double()
    expected = torch.stack([reader.log_probs([reader.begin(b"")])[0] for reader in ensemble.model.readers])
    assert torch.allclose(found, expected.mean(0).log_softmax(-1), atol=1e-5)
    alone = ensemble.generate("", **GREEDY)
    assert ensemble.generate(["", "the"], **GREEDY)[0] == alone
    assert "".join(ensemble.stream("", **GREEDY)) == alone
    assert ensemble.next_token("").solution.log_probs[0].double() == pytest.approx(found, abs=1e-5)


def test_bos_has_the_first_byte_predicted(pruned):
    documents = [Document("a", "the other")]
    plain, begun = (observe_text(pruned, documents, bos=bos) for bos in (False, True))
    assert len(plain) == 8
    assert bytes(begun.targets.tolist()) == b"the other"
    assert torch.allclose(begun.hidden[0][1:, :SYMBOLS], plain.hidden[0][:, :SYMBOLS], atol=1e-12)
