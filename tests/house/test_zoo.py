"""The bundled members: their texts, their cards, and what ``meet`` gains on text that they have not seen."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open

from fit import choose_trust, compare, held_out_documents, meet, read
from softmeet import Ensemble
from softmeet.evaluation.choices import RuleChoice, with_baselines
from softmeet.evaluation.documents import Document
from softmeet.evaluation.intervals import Clusters, clusters, paired
from softmeet.evaluation.perplexity import evaluate
from softmeet.evaluation.positions import observe_text
from softmeet.members import zoo
from zoo_texts import HELD_OUT, HELD_OUT_KJV, PARALLELS, kjv_works, shingle_share, split_by_work

FOLDERS = [*sorted((zoo.folder() / "wide").iterdir()), *sorted((zoo.folder() / "narrow").iterdir())]

MIXED = sorted((zoo.folder() / "mixed").iterdir())


def test_the_kjv_splits_by_book_with_few_shared_shingles():
    training, held_out = split_by_work(kjv_works())
    assert {w.name for w in held_out} == set(HELD_OUT_KJV)
    assert len(training) + len(held_out) == 66
    assert 0 < shingle_share(held_out, training) < 0.005


def test_parallel_books_stay_on_one_side():
    for pair in ({"1 Kings", "1 Chronicles"}, {"Matthew", "Mark", "Luke"}):
        assert any(pair <= group for group in PARALLELS)
    for book in ("1 Kings", "2 Chronicles", "Mark"):
        with pytest.raises(ValueError, match="parallel works must stay on one side"):
            split_by_work(kjv_works(), frozenset({book}))
    kings = [w for w in kjv_works() if w.name == "2 Kings"]
    assert shingle_share(kings, [w for w in kjv_works() if w.name == "2 Chronicles"]) > 0.01


def test_shingles_by_hand():
    text = "one two three four five six seven eight nine ten eleven twelve"
    a, b = Document("a", text + " thirteen"), Document("b", "Zero. " + text.upper().replace(" ", ", ") + "!")
    assert shingle_share([a], [b]) == 0.5
    assert shingle_share([a], [a]) == 1.0
    assert shingle_share([Document("short", "too short")], [a]) == 0.0


def test_sizes_and_formats():
    files = [p for p in zoo.folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 24e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl")]
    tokenizers = {(folder / "tokenizer.json").read_bytes() for folder in FOLDERS}
    assert len(tokenizers) == 1
    assert len(json.loads(tokenizers.pop())["model"]["vocab"]) == 4096
    sizes = [len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) for folder in MIXED]
    assert sizes == [2048, 1536]
    for folder in (*FOLDERS, *MIXED):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_members_of_a_family_are_of_similar_strength_and_trained_out(family):
    found = [json.loads((f / "training.json").read_text()) for f in sorted((zoo.folder() / family).iterdir())]
    measure, bound = ("held_out_bits_per_byte", 0.05) if family == "mixed" else ("held_out_nats", 0.1)
    held_out = [member[measure] for member in found]
    assert max(held_out) - min(held_out) < bound
    for member in found:
        (before, earlier), (after, last) = member["curve"][-2:]
        assert before == pytest.approx(0.9 * after, abs=1)
        assert earlier - last < 0.01


def test_cards_say_what_was_measured():
    for folder in (*FOLDERS, *MIXED):
        card, facts = (folder / "README.md").read_text(), json.loads((folder / "training.json").read_text())
        assert f"{facts['held_out_nats']:.4f} nats per token" in card
        share = float(re.search(r"training part \| ([\d.]+)%", card)[1])
        assert share <= 0.5
        assert "CC-BY 2.5" in card
        assert "Paradise" not in card or "paradiseregained" in card
        for book in ("Ruth", "Zechariah", "macbeth"):
            assert book in card


def test_architectures(wide, narrow):
    assert [type(m).__name__ for m in wide.model.members] == [
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "GPTNeoXForCausalLM",
    ]
    assert all(96 <= head.d <= 192 for head in wide.model.heads)
    assert [head.d for head in narrow.model.heads] == [16, 16, 16, 16]
    assert all(m.config.hidden_size == 128 for m in narrow.model.members)
    assert "macbeth_gut" in HELD_OUT


@pytest.fixture(scope="module")
def halves(narrow):
    """The beginnings of ten books to choose by, and of ten to judge by."""
    return read(narrow, 104)


def test_the_cards_loss_is_about_what_the_kjv_gives(narrow, halves):
    """A member that was damaged on its way into the package would be far worse than its card says."""
    nats = [
        -narrow.model.heads[0].log_probs(half.hidden[0]).gather(-1, half.targets[:, None]).squeeze(-1)
        for half in halves
    ]
    card = json.loads((FOLDERS[3] / "training.json").read_text())["held_out_nats"]
    assert card - 1.0 < torch.cat(nats).mean().item() < card + 0.3


@pytest.mark.slow
def test_meet_beats_logit_averaging_on_the_narrow_family(narrow, halves):
    """Trust chosen on ten books; on ten others the 95 % interval by book lies below -0.005 nats a token."""
    tuning, test = halves
    some = tuning.take(torch.arange(0, len(tuning), 12))
    choice = meet(choose_trust(narrow, some, (0.3, 1.0)), 4)
    assert len(test) >= 1000
    found = compare(narrow, test, [choice, RuleChoice("logit-mean", {"rule": "logit-mean"})]).choices
    within = clusters(test.document)
    assert (within.kind, within.count) == ("documents", 10)
    assert paired(found[choice.name].nats, found["logit-mean"].nats, within).high < -0.005


@pytest.mark.slow
def test_two_members_of_different_tokenizers_are_better_than_either():
    """Uniform logit averaging over bytes; the 95 % interval by book lies below -0.005 nats a byte."""
    ensemble = Ensemble.from_pretrained("mixed")
    assert ensemble.model.config.vocabulary == "bytes"
    documents = [Document(book.name, book.text[2000:2250]) for book in held_out_documents()]
    positions = observe_text(ensemble, documents)
    found = evaluate(ensemble, positions, with_baselines([]))
    within = clusters(positions.document)
    assert (within.kind, within.count) == ("documents", 20)
    for own in found.members.values():
        assert paired(found.choices["logit-mean"].nats, own.nats, within).high < -0.005


def test_intervals_by_hand():
    a = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    found = paired(a, torch.zeros(6), Clusters(torch.tensor([0, 0, 1, 1, 2, 2]), "documents"))
    # Mean 2, standard error of three equal documents sqrt(1 / 3), t(0.975, 2) = 4.3027.
    assert found.mean == pytest.approx(2.0)
    assert found.high - found.mean == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
