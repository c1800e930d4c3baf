"""Structured output: what a text has to be, over tokens and over bytes, by every rule."""

import re

import lark
import pytest
from structures import CLOCK, SCHEMA, SUMS, WORDS, is_json

from softmeet import Ensemble, Structure
from softmeet.engine.masking import Mask
from softmeet.errors import InvalidInputError
from softmeet.structured import compilers

# (a structure, an oracle from outside which says whether a text is one)
CASES = {
    "json": (Structure.json_schema(SCHEMA), is_json),
    "regex": (Structure.regex(CLOCK), lambda text: re.fullmatch(CLOCK, text)),
    "choice": (Structure.choice(WORDS), WORDS.__contains__),
    "grammar": (Structure.grammar(SUMS), lambda text: lark.Lark(SUMS).parse(text)),
}
# (members, rule, keyword arguments)
ENSEMBLES = {
    "meet": ("narrow", "meet", {"trust": 1.0, "gate": "none"}),
    "prob-mean": ("wide", "prob-mean", {}),
    "bytes": ("mixed", "logit-mean", {"vocabulary": "bytes"}),
}


@pytest.fixture(scope="module")
def ensembles():
    return {name: Ensemble.from_pretrained(own, rule, **more) for name, (own, rule, more) in ENSEMBLES.items()}


def require(structure, oracle, text):
    # A text that is cut is no text of the structure, and the structure says so.
    assert not structure.allows(text) or oracle(text)
    return structure.allows(text)


@pytest.mark.parametrize("rule", ENSEMBLES)
def test_texts_are_what_they_have_to_be(ensembles, rule):
    """Of each structure one text is the likeliest, or one is drawn, by turns."""
    ensemble, complete = ensembles[rule], []
    for k, (structure, oracle) in enumerate(CASES.values(), list(ENSEMBLES).index(rule)):
        more = {"do_sample": False} if k % 2 else {"seed": 1}
        text = ensemble.generate("And the king", structure=structure, max_new_tokens=72, **more)
        complete.append(require(structure, oracle, text))
    assert sum(complete) >= 0.7 * len(complete)


@pytest.mark.parametrize(
    ("how", "case"),
    [
        ({"num_beams": 3}, "json"), ({"num_beams": 3, "do_sample": True}, "regex"),
        ({"prompt_lookup_num_tokens": 3}, "json"),
    ],
)  # fmt: skip
def test_beams_and_drafts_keep_to_the_structure(ensembles, how, case):
    structure, oracle = CASES[case]
    assert oracle(ensembles["prob-mean"].generate("In the", structure=structure, max_new_tokens=90, **how))


def test_the_end_comes_only_where_the_text_is_complete(ensembles):
    structure = Structure.regex("a{3}b{0,1}")
    for ensemble in (ensembles["prob-mean"], ensembles["bytes"]):
        assert ensemble.generate("And", structure=structure, max_new_tokens=2, do_sample=False) in ("a", "aa")
        assert ensemble.generate("And", structure=structure, do_sample=False, max_new_tokens=9) in ("aaa", "aaab")


@pytest.mark.parametrize("text", ["\x7f", "\x00", "\x1b[0m", '"\\', "\u2028", "\x85"])
def test_every_character_can_be_chosen(text):
    assert Structure.choice([text, "b"]).allows(text)


def test_what_other_options_forbid_is_said(ensembles):
    for ensemble in (ensembles["prob-mean"], ensembles["bytes"]):
        with pytest.raises(InvalidInputError, match=r"nothing is left that the structure allows.*min_new_tokens"):
            ensemble.generate(
                "And", structure=Structure.choice(["yea"]), min_new_tokens=9, max_new_tokens=20, do_sample=False
            )


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (Structure.json_schema, {"type": "integer", "minimum": 3, "maximum": 1}, "minimum .3. is greater"),
        (Structure.json_schema, {"type": "array", "uniqueItems": True}, 'Unimplemented keys: ."uniqueItems"'),
        (Structure.json_schema, {"$ref": "#"}, "no text is allowed by it"),
        (Structure.json_schema, {"enum": [float("nan")]}, "no JSON"),
        (Structure.json_schema, "{", "no JSON"),
        (Structure.json_schema, "[]", "an object, got list"),
        (Structure.json_schema, {"enum": ["x" * 300_000]}, "at most 262,144 characters"),
        (Structure.regex, "(?=a)b", "look-around"),
        (Structure.regex, "(", "unclosed group"),
        (Structure.regex, r"[^\s\S]", "no text is allowed by it"),
        (Structure.regex, 3, "expected a text, got int"),
        (Structure.choice, [], "at least one text"),
        (Structure.choice, "yes", "a list of at least one text"),
        (Structure.grammar, "start: x", "at 1.8.: unknown name"),
        (Structure.grammar, "start: start", "no text is allowed by it"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_loaded(make, given, message):
    with pytest.raises(InvalidInputError, match=message):
        make(given)


def test_a_schema_that_takes_for_ever_is_ended(monkeypatch):
    assert compilers._SECONDS == 1.6
    patterns = [{"pattern": f"(.*[a-{last}].{{{20 + k}}})"} for k, last in enumerate("bcdefghijklmnopq")]
    with monkeypatch.context() as patch:
        patch.setattr(compilers, "_SECONDS", 0.5)
        with pytest.raises(InvalidInputError, match=r"takes longer than 0.5 seconds|takes too much memory"):
            Structure.json_schema({"type": "string", "allOf": patterns})
    assert Structure.choice(["still", "alive"]).allows("alive")


def test_a_structure_of_another_type_is_refused(ensembles):
    with pytest.raises(InvalidInputError, match=r"softmeet.Structure.json_schema.*got dict"):
        ensembles["prob-mean"].generate("And", structure=SCHEMA)


def test_a_text_goes_on_after_another_one_was_too_complex(monkeypatch):
    import llguidance

    few = llguidance.LLParserLimits(
        step_lexer_fuel=100_000, step_max_items=40_000, max_lexer_states=300, verbose_errors=False
    )
    monkeypatch.setattr("softmeet.structured.worker.LIMITS", few)
    ensemble = Ensemble.from_pretrained("narrow", "logit-mean")

    def ids(text):
        return ensemble.tokenizer(text, add_special_tokens=False)["input_ids"]

    structure = Structure.regex("a(c+d|b(.*[a-m].{14}[n-z].*){2})")
    row = Mask(structure, ensemble.tokenizer, [0], ensemble.model.config.vocab_size).begin()
    known = row.allowed(ids("ac"))
    texts = [ids("ab" + ("klmnox yza" * 40)[:length]) for length in range(10, 400, 10)]
    with pytest.raises(InvalidInputError, match="too"):
        list(map(row.allowed, texts))
    assert row.allowed(ids("ac")).equal(known)
