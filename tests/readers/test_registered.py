"""Readers that a package or a program registers: the guide's, as printed, and those that break a law."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from byte_members import EXACT
from commands import run
from serving import http, running, serving_of

import softmeet
from softmeet.errors import CheckpointError, InvalidInputError, NonFiniteError, ReaderError, UnsupportedHeadError
from softmeet.evaluation.choices import parse_choices
from softmeet.evaluation.documents import Document
from softmeet.evaluation.perplexity import evaluate_text
from softmeet.members import registered
from softmeet.members.spelling import spelling_of
from softmeet.readers.byte_reader import ByteReader
from softmeet.readers.byte_tokenizer import byte_tokenizer
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.guarded import GuardedReader
from softmeet.readers.reader import Given, Read, Traits, finished
from softmeet.readers.stateless import StatelessReader
from softmeet.readers.token_alphabet import TokenAlphabet
from softmeet.scaling.local import LocalEngine
from softmeet.testing import check_reader

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "write-a-reader.md"
PROMPT = "the king "
LETTERS = TokenAlphabet(None, 26, frozenset())  # without a tokenizer


def command(*arguments):
    """What a command prints."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(kind):
    """The code blocks of the guide."""
    return re.findall(rf"^```{kind}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _forgotten():
    """Nothing stays registered."""
    yield
    registered._registered.clear()
    registered._made.clear()
    registered._installed.cache_clear()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The guide's package, as installed; in the folder of its text."""
    info = tmp_path / "softmeet_bigrams-0.1.dist-info"
    info.mkdir()
    (tmp_path / "softmeet_bigrams.py").write_text(blocks("python")[0])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: softmeet-bigrams\nVersion: 0.1\n")
    (line,) = re.findall(r'entry-points."softmeet.readers"\]\n(.*)\n', blocks("toml")[0])
    (info / "entry_points.txt").write_text("[softmeet.readers]\n" + line.replace('"', "") + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registered._installed.cache_clear()
    Path("psalm.txt").write_text("The LORD is my shepherd; I shall not want. " * 20)
    return ["-m", "bigrams:psalm.txt", "-m", "wide/gpt2", "--rule", "prob-mean"]


def test_the_guides_reader_takes_at_most_forty_lines():
    assert len(blocks("python")[0].splitlines()) <= 40


def test_the_guide_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    text = names["ensemble"].generate("The LORD is ", seed=1, max_bytes=40)
    assert 0 < len(text.encode()) <= 40


def test_the_guides_package_generates_and_evaluates(installed, tmp_path):
    asked = ["--max-new-bytes", 20, "--seed", 1, "--json"]
    facts = json.loads(command("generate", "The LORD is ", *installed, *asked))
    assert (facts["vocabulary"], facts["tokens"]) == ("bytes", 20)
    command("evaluate", *installed, "--text", "psalm.txt", "--max-tokens", 120, "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    bits = {name: own["bits_per_byte"] for name, own in found["members"].items()}
    # The text is the one that it was counted in.
    assert min(bits, key=bits.get).endswith("psalm.txt")


def test_the_guides_package_is_saved_and_served(installed):
    ensemble = softmeet.Ensemble.from_pretrained(["bigrams:psalm.txt", "wide/gpt2"], "prob-mean")
    ensemble.save_pretrained("saved")
    expected = ensemble.generate(PROMPT, seed=3, max_bytes=24)
    assert softmeet.Ensemble.from_pretrained("saved").generate(PROMPT, seed=3, max_bytes=24) == expected
    asked = {"prompt": PROMPT, "seed": 3, "max_tokens": 24, "softmeet": {"max_bytes": 24}}
    with running(serving_of({"x": ensemble})) as url:
        answer = http.post(f"{url}/v1/completions", json=asked)
    assert answer.json()["choices"][0]["text"] == expected


def test_a_copy_for_another_process_makes_its_reader_there(installed):
    """As Ray's workers get it; they know the package, as it is installed, and no reader that was made here."""
    from softmeet.scaling.packing import pack, unpack

    ensemble = softmeet.Ensemble.from_pretrained(["bigrams:psalm.txt", "wide/gpt2"], "prob-mean")
    packed, _ = pack(ensemble)
    registered._made.clear()
    copy = unpack(packed)
    assert copy.model.members[0].reader is not ensemble.model.members[0].reader
    assert copy.inspect("The LORD is", 3) == ensemble.inspect("The LORD is", 3)


class Counted(StatelessReader):
    """What follows depends on all symbols before, over the tokens of a tiny tokenizer."""

    def __init__(self, name="counted", tokenizer=None, **traits):
        super().__init__(name, TokenAlphabet.of(tokenizer or tiny.tokenizer()), 64, Traits(**traits))
        self.table = torch.randn(97, self.alphabet.size, generator=torch.Generator().manual_seed(0)).double()

    def next_logits(self, texts):
        found = torch.stack([self.table[sum((k + 1) * token for k, token in enumerate(text)) % 97] for text in texts])
        return self.spoilt(found, texts)

    def spoilt(self, found, texts):
        return found


def ensemble_of(tmp_path, factory, rule="prob-mean", **options):
    softmeet.register_reader("mine", factory)
    return softmeet.Ensemble.from_pretrained(["mine:x", str(tiny.save(tmp_path, "gpt2"))], rule, **options)


def test_over_common_tokens_every_road_gives_the_rules_text(tmp_path):
    """The average, computed by hand of the reader and of the model."""
    ensemble = ensemble_of(tmp_path, lambda rest: Counted(), dtype="float64")
    assert ensemble.model.config.vocabulary == "tokens"
    check_reader(Counted())
    tokens = ensemble.tokenizer(PROMPT)["input_ids"]
    mine, model, expected = Counted(), ensemble.model.members[1], list(tokens)
    for _ in range(8):
        theirs = model(torch.tensor([expected])).logits[0, -1].double().softmax(-1)
        expected.append(int((mine.next_logits([expected])[0].softmax(-1) + theirs).argmax()))
    text = ensemble.tokenizer.decode(expected[len(tokens) :], skip_special_tokens=True)
    plain = {"do_sample": False, "max_new_tokens": 8}
    for more in ({}, {"speculate": 3}, {"use_cache": False}, {"num_beams": 1}):
        assert ensemble.generate(PROMPT, **plain, **more) == text
    assert "".join(ensemble.stream(PROMPT, **plain)) == text
    assert ensemble.generate([PROMPT, "and the "], **plain)[0] == text
    with running(serving_of({"x": ensemble})) as url:
        answer = http.post(f"{url}/v1/completions", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 8})
    assert answer.json()["choices"][0]["text"] == text
    report = ensemble.inspect(PROMPT)[-1]
    before = [tokens[:-1]]
    assert report.member_log_probs[0] == pytest.approx(mine.next_logits(before)[0].log_softmax(-1)[tokens[-1]].item())


class Unmoved(Counted):
    """Has forks whose length is 0, though they go on where the row was."""

    def fork(self, row, count=1, length=None):
        forks = super().fork(row, count, length)
        for one in forks:
            one.own, one.text = (*one.own, *one.text), ()
        return forks


class Torn(Counted):
    """Raises what it should not, at its fifth question."""

    def spoilt(self, found, texts):
        self.asked = getattr(self, "asked", 0) + 1
        return found if self.asked < 5 else self.nowhere


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Unmoved, "expected forks of length"),
        (Torn, "whole_equals_one_by_one: the reader raised AttributeError: 'Torn' object"),
    ],
)
def test_laws_find_what_breaks_them(broken, said):
    with pytest.raises(AssertionError, match=said):
        check_reader(broken())


class Deep(Given):
    """Predictions that have hidden states too, as those of a model have."""

    def hidden(self, places=slice(None)):
        return torch.zeros(len(self), 3)


class Onwards(Counted):
    """Cannot take back what it has read, and tells hidden states."""

    def __init__(self, name):
        super().__init__(name, can_crop=False)

    def crop(self, row, length):
        raise self.cannot("take back what it has read")

    def read(self, asked):
        found = yield from super().read(asked)
        return Deep(found.logits(), found.counts, found.errors)


def test_one_that_cannot_crop_is_generated_from_and_served(tmp_path):
    plain = {"do_sample": False, "max_new_tokens": 12}
    expected = ensemble_of(tmp_path, lambda rest: Counted("mine")).generate(PROMPT, **plain)
    ensemble = ensemble_of(tmp_path, lambda rest: Onwards("mine"))
    assert ensemble.generate(PROMPT, **plain) == expected
    with running(serving_of({"x": ensemble}, speculate=4)) as url:
        answer = http.post(f"{url}/v1/completions", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 12})
    assert answer.json()["choices"][0]["text"] == expected


class Brief(Counted):
    """Finds its context full behind nine tokens, long before its limit."""

    def read(self, asked):
        found = yield from super().read(asked)
        for one in asked:
            one.row.full = one.row.length >= 9
        return found


@pytest.mark.parametrize("more", [{"speculate": 0}, {"speculate": 3}, {"num_beams": 2}], ids=str)
def test_a_text_ends_where_a_members_context_is_full(tmp_path, more, caplog):
    """Beside a model, whose predictions are hidden states."""
    ensemble, asked = ensemble_of(tmp_path, lambda rest: Brief()), {"do_sample": False, "max_new_tokens": 20, **more}
    ids = ensemble.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    (found,) = ensemble.model.generate(ids, **asked).tolist()
    (free,) = ensemble_of(tmp_path, lambda rest: Counted()).model.generate(ids, min_new_tokens=20, **asked).tolist()
    assert found[-1] == ensemble.tokenizer.eos_token_id
    assert len(found) == 10
    assert more.get("num_beams") or found[:9] == free[:9]
    assert "the context of counted is full" in caplog.text


class Full(Brief):
    """Expects nothing but an end where it is full."""

    def spoilt(self, found, texts):
        full = torch.tensor([len(text) >= 9 for text in texts])
        ends = torch.full_like(found, -torch.inf).index_fill(-1, torch.tensor(sorted(self.alphabet.ends)), 0.0)
        return torch.where(full[:, None], ends, found)


class Endless(Counted):
    def spoilt(self, found, texts):
        return found.index_fill(-1, torch.tensor(sorted(self.alphabet.ends)), -torch.inf)


@pytest.mark.parametrize("rule", ["logit-mean", "prob-mean"])
def test_a_text_that_is_full_ends_though_no_other_member_expects_an_end(rule):
    softmeet.register_reader("mine", lambda rest: Full("x") if rest == "x" else Endless("y"))
    ensemble = softmeet.Ensemble.from_pretrained(["mine:x", "mine:y"], rule)
    ids = ensemble.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for more in ({"speculate": 0}, {"speculate": 3}, {"num_beams": 2}):
        found = ensemble.model.generate(ids, do_sample=False, max_new_tokens=20, **more)[0].tolist()
        assert found[-1] == ensemble.tokenizer.eos_token_id
        assert len(found) == 10


def test_tokens_that_have_no_bytes_may_stand_before_a_text_over_bytes():
    below, tokenizer = Counted("mine", byte_tokenizer()), byte_tokenizer()
    reader = ByteReader(ByteMember(below, spelling_of("mine", tokenizer), EXACT), "mine")
    own, text = [256, 104, 256, 256], [116, 104, 101]
    told = reader.read_whole([text], [range(1, 4)], own).log_probs()
    expected = below.next_logits([[*own, *text[:k]] for k in range(1, 4)]).log_softmax(-1)
    assert torch.allclose(told, expected, atol=1e-9)
    assert not torch.allclose(reader.read_whole([text], [range(1, 4)], [256]).log_probs(), expected, atol=1e-3)


def test_rules_that_read_heads_say_that_it_has_none(tmp_path):
    with pytest.raises(UnsupportedHeadError, match="mine:x"):
        ensemble_of(tmp_path, lambda rest: Counted(), "meet")


class Nan(Counted):
    """Tells NaN behind texts with an odd number of symbols, but for short ones."""

    def spoilt(self, found, texts):
        odd = torch.tensor([len(text) % 2 and len(text) > 6 for text in texts], dtype=torch.bool)
        return found.masked_fill(odd[:, None], torch.nan)


class Narrow(Counted):
    def spoilt(self, found, texts):
        return found[:, 1:]


class Raises(Counted):
    def spoilt(self, found, texts):
        raise ZeroDivisionError("by nothing")


class Forgetful(Counted):
    def read(self, asked):
        found = yield from super().read(asked)
        for one in asked:
            one.row.text = ()
        return found


class Fewer(Counted):
    def read(self, asked):
        found = yield from super().read(asked)
        return Given(found.logits()[: sum(found.counts[:-1])], [*found.counts[:-1], 0], found.errors)


class Nothing(Counted):
    def read(self, asked):
        yield from ()


BROKEN = {
    Nan: (NonFiniteError, "mine"),
    Narrow: (ReaderError, "the reader mine told .* logits in float32 or float64 were due"),
    Raises: (ReaderError, "the reader mine raised ZeroDivisionError: by nothing: try it by"),
    Forgetful: (ReaderError, "the reader mine left a row at length 0"),
    Fewer: (ReaderError, "the reader mine told 0 places of a row"),
    Nothing: (ReaderError, "the reader mine told NoneType"),
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_what_breaks_a_law_fails_by_its_name(broken, tmp_path):
    kind, said = BROKEN[broken]
    ensemble = ensemble_of(tmp_path, lambda rest: broken("mine"))
    softmeet.register_reader("bytes", lambda rest: broken("mine", byte_tokenizer()))
    with pytest.raises(kind, match=said):
        ensemble.generate(PROMPT, max_new_tokens=6, seed=0)
    with pytest.raises(kind, match=said):  # where one is read over bytes, it is tried as it is loaded
        softmeet.Ensemble.from_pretrained(["bytes:x", "wide/gpt2"], "prob-mean").generate(PROMPT, max_bytes=6)


def test_a_row_that_fails_harms_no_other():
    reader = GuardedReader(Nan("mine"))
    found = [reader.read_whole([[1, 2]], [[2]]).logits()]
    rows = [reader.open() for _ in range(3)]
    asked = [Read(row, text, [len(text)]) for row, text in zip(rows, ([1] * 7, [1, 2], [3] * 9), strict=True)]
    told = finished(reader.read(asked))
    assert set(told.errors) == {0, 2}
    assert told.counts == [0, 1, 0]
    assert torch.equal(told.logits(), found[0])


def test_a_server_runs_no_more_sequences_than_it_has_rows(tmp_path):
    ensemble = ensemble_of(tmp_path, lambda rest: Counted("mine", rows=2))
    serving = serving_of({"x": ensemble})
    assert serving.batcher.limits.rows == 2
    with running(serving) as url:
        answer = http.post(f"{url}/v1/completions", json={"prompt": PROMPT, "n": 5, "max_tokens": 4, "seed": 1})
    assert len(answer.json().get("choices", ())) == 5, answer.text
    with pytest.raises(InvalidInputError, match="at most 2 open rows of mine"):
        ensemble.generate([PROMPT] * 3, max_new_tokens=2)


def test_an_evaluation_in_threads_asks_a_reader_from_one_at_a_time(tmp_path):
    ensemble = ensemble_of(tmp_path, lambda rest: Counted("mine", rows=1))
    documents = [Document(str(k), "the king and the " * 80) for k in range(4)]
    with LocalEngine(4) as engine:
        found = evaluate_text(ensemble, documents, parse_choices(["prob-mean"], 2), engine=engine, window=60)
    assert len(found.positions) > 1000


def changed(**fields):
    """A reader with other fields."""
    found = Counted()
    vars(found).update(fields)
    return found


@pytest.mark.parametrize(
    ("factory", "line", "kind", "said"),
    [
        (lambda rest: 1 / 0, "mine:x", CheckpointError, "cannot load mine:x: its factory raised ZeroDivisionError"),
        (lambda rest: "reader", "mine:x", CheckpointError, "expected a softmeet.Reader of its factory, got str"),
        (lambda rest: changed(limit=None), "mine:x", CheckpointError, "of symbols as its reader's limit, got None"),
        (lambda rest: changed(alphabet=LETTERS), "mine:x", CheckpointError, "let its alphabet be"),
        (lambda rest: Counted(), "mine:x+dtype=float32", InvalidInputError, "nothing but a prompt and a name"),
        (
            lambda rest: Counted(),
            "mein:x",
            CheckpointError,
            "did you mean mine[?] .*no package here has readers",
        ),
    ],
)
def test_what_cannot_be_a_member_is_refused(factory, line, kind, said):
    softmeet.register_reader("mine", factory)
    with pytest.raises(kind, match=said):
        softmeet.Ensemble.from_pretrained([line])


def test_names_are_identifiers_and_a_packages_stays(installed):
    for name, said in (("my readers", "letters, digits"), ("bigrams", "taken by softmeet_bigrams:Bigrams")):
        with pytest.raises(InvalidInputError, match=said):
            softmeet.register_reader(name, Counted)
