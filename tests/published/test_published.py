"""GaC and UniTE as their code has them, against what another made of that code."""

from __future__ import annotations

import string

import byte_members
import byte_tokenizers
import numpy as np
import published_oracles as oracles
import pytest
import torch
from commands import run
from serving import http, running, serving_of
from tokenizers.processors import TemplateProcessing

from softmeet import Ensemble
from softmeet.errors import InvalidInputError
from softmeet.hf.prompts import encoded
from softmeet.readers.reader import Read, finished
from softmeet.testing import check_reader

PROMPT = "The king said"
PAIRS = [("gpt2", "llama"), ("llama", "gpt2"), ("gpt2", "qwen"), ("llama", "gemma")]
# Even and other weights, each with every kind of first member.
IN_TURN = [pytest.param(pair, ((0.5, 0.5), (0.2, 0.8))[k // 2], id="-".join(pair)) for k, pair in enumerate(PAIRS)]
GAC, UNITE = "union:as=gac", "union:k=4:as=unite"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("members"), {}
    for k, kind in enumerate(("gpt2", "llama", "qwen", "gemma")):
        tokenizer = kind
        if kind in ("llama", "gemma"):
            # GaC's code wants all letters; and a token begins texts.
            tokenizer = byte_tokenizers.llama(dummy=kind == "llama", letters=string.ascii_letters + string.digits)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        found[kind] = str(byte_members.save(folder / kind, tokenizer, k))
    return found


@pytest.fixture(scope="module")
def ensembles(folders):
    """Ensembles by the pair of their members and their vocabulary."""
    loaded = {}
    return {
        (pair, over): Ensemble.from_pretrained([folders[kind] for kind in pair], vocabulary=over, loaded=loaded)
        for pair in PAIRS
        for over in (GAC, UNITE)
    }


def published(ensemble):
    """The members as the oracles know them."""

    def member(i):
        @torch.inference_mode()
        def logits(ids):
            return ensemble.model.members[i](torch.tensor([ids])).logits[0, -1].double().numpy()

        return oracles.PublishedMember(ensemble.model.tokenizer_of(i), logits)

    return [member(i) for i in range(2)]


def kinds_of(pair):
    return [oracles.SENTENCEPIECE if kind in ("llama", "gemma") else oracles.BYTE_LEVEL for kind in pair]


def prompts(members):
    return [tuple(one.tokenizer(PROMPT)["input_ids"]) for one in members]


def first(ensemble, weights):
    """Our probabilities behind the prompt."""
    inputs = encoded(ensemble.model, ensemble.tokenizer, [PROMPT])
    return ensemble.model(**inputs, weights=list(weights), logits_to_keep=1).logits[0, -1].double().exp()


@pytest.mark.parametrize(("pair", "weights"), IN_TURN)
def test_gac_chooses_and_feeds_what_its_code_does(pair, weights, ensembles):
    ensemble, w = ensembles[pair, GAC], np.array(weights)
    members = published(ensemble)
    scores = oracles.gac_scores(members, prompts(members), w)
    ours, keys = first(ensemble, weights), ensemble.model.space.keys
    assert {key: p for key, p in zip(keys, ours.tolist(), strict=False) if p} == pytest.approx(
        {key: score for key, score in scores.items() if score}, abs=1e-6
    )
    chosen, states = oracles.gac_greedy(members, prompts(members), w, 12)
    found = ensemble.generate(PROMPT, max_new_tokens=12, do_sample=False, weights=list(weights))
    fed = states[0][len(prompts(members)[0]) :]
    assert found == ensemble.model.space.spellings[0].spelled(fed).decode(errors="replace")
    assert len(chosen) > 3


def test_what_stays_of_a_text_that_is_cut_anew_is_not_read_again(ensembles, monkeypatch):
    ensemble = ensembles[("gpt2", "llama"), UNITE]
    _, reader = ensemble.model.readers_of_members
    read, counts = reader.below.read, []

    def counted(asked):
        counts.append(sum(len(one.symbols) for one in asked))
        return read(asked)

    monkeypatch.setattr(reader.below, "read", counted)
    prompts = [PROMPT + " unto the people", "And it came to pass in the days"]
    ensemble.generate(prompts, max_new_tokens=24, do_sample=False)
    assert len(counts) == 24
    assert sum(counts[1:]) < 4 * 23 * 2, counts
    assert not reader.below._rows


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_gac_reads_keys_as_its_code_does(pair, ensembles):
    """Every member every key, also those that it lacks, the names of bytes and ends."""
    ensemble = ensembles[pair, GAC]
    members, space = published(ensemble), ensemble.model.space
    ends = oracles.gac_ends(members)
    assert {key for k, key in enumerate(space.keys) if k in space.alphabet.ends} == ends & {*space.keys}
    assert {*space.keys} == set(oracles.BYTES).union(*(own.values() for own in oracles.gac_union(members)))
    for reader, member in zip(ensemble.model.readers_of_members, members, strict=True):
        for symbol, key in enumerate(space.keys):
            assert list(reader.tokens_of(symbol)) == oracles.gac_tokens(member, key, ends), key


def test_gacs_gate_is_unsure(ensembles):
    """Where the largest probability of the first member is of a key with one id."""
    ensemble = ensembles[PAIRS[0], GAC]
    members, w = published(ensemble), np.array([0.5, 0.5])
    for threshold in (0.02, 0.3):
        _, states = oracles.gac_greedy(members, prompts(members), w, 12, threshold)
        found = ensemble.generate(PROMPT, max_new_tokens=12, do_sample=False, gate=f"unsure:{threshold}")
        fed = states[0][len(prompts(members)[0]) :]
        assert found == ensemble.model.space.spellings[0].spelled(fed).decode(errors="replace")


def test_gac_stops_at_a_tokenizer_that_lacks_a_byte_or_a_letter(folders, tmp_path, monkeypatch):
    def lacking(self, text):
        return [] if text == "\4" else self.backend_tokenizer.encode(text, add_special_tokens=False).tokens

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.tokenize", lacking)
        with pytest.raises(InvalidInputError, match="of which no token spells the byte 4: say vocabulary='union'"):
            Ensemble.from_pretrained([folders["gpt2"], folders["qwen"]], vocabulary=GAC)
    poor = str(byte_members.save(tmp_path, "llama", 1))
    with pytest.raises(InvalidInputError, match="the letter 0 is a token of no other member"):
        Ensemble.from_pretrained([folders["gpt2"], poor], vocabulary=GAC)


@pytest.mark.parametrize(("pair", "weights"), IN_TURN)
def test_unite_chooses_and_feeds_what_its_code_does(pair, weights, ensembles):
    ensemble, w, kinds = ensembles[pair, UNITE], np.array(weights), kinds_of(pair)
    members, space = published(ensemble), ensemble.model.space
    tables = oracles.unite_tables(members, prompts(members), kinds, 4)
    expected = {(key, tables[0][key][1]): p for key, p in oracles.unite_means(tables, w).items()}
    ours = first(ensemble, weights)
    assert {pair: p for pair, p in zip(space.symbols, ours.tolist(), strict=False) if p} == pytest.approx(
        expected, abs=1e-6
    )
    _, states = oracles.unite_greedy(members, PROMPT, w, 12, 4, kinds)
    given = {"max_new_tokens": 12, "do_sample": False, "weights": list(weights)}
    fed = states[0][len(prompts(members)[0]) :]
    assert ensemble.generate(PROMPT, **given) == space.spellings[0].spelled(fed).decode(errors="replace")
    assert ensemble.generate([PROMPT, "And"], **given)[0] == ensemble.generate(PROMPT, **given)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_unite_seeks_the_keys_that_a_member_lacks_as_its_code_does(pair, ensembles):
    ensemble = ensembles[pair, UNITE]
    space = ensemble.model.space
    keys = sorted({key for key, _ in space.symbols})
    assert "/n" in keys
    for own, member, kind in zip(space.members, published(ensemble), kinds_of(pair), strict=True):
        assert own.sought(keys) == {key: oracles.unite_missing(member, key, kind) for key in keys}


@pytest.mark.parametrize(("pair", "the"), [(("llama", "gpt2"), "\u2581the"), (("gpt2", "llama"), "Ġthe")])
def test_by_unite_the_second_member_reads_the_first_ones_text_anew(pair, the, ensembles):
    """A prompt without the tokens that begin texts, but with those that it names, and behind a symbol with both."""
    ensemble = ensembles[pair, UNITE]
    reader, one = ensemble.model.readers_of_members[1], ensemble.model.tokenizer_of(0)
    prompt = PROMPT if pair[0] == "llama" else one.eos_token + PROMPT
    own = one(prompt)["input_ids"]
    row = reader.open(own=own)
    tokens = [ensemble.model.space.alphabet.of_token[one.convert_tokens_to_ids(the)]]
    told = finished(reader.read([Read(row, tokens, [0, 1])])).hidden()
    text = one.decode([*own, one.convert_tokens_to_ids(the)])
    assert (one.bos_token if pair[0] == "llama" else one.eos_token) in text
    member = published(ensemble)[1]
    for found, whole in zip(told, (prompt, text), strict=True):
        expected = member.logits(tuple(member.tokenizer(whole)["input_ids"]))
        assert found.double().numpy() == pytest.approx(expected, abs=1e-5)
    reader.close(row)


@pytest.mark.parametrize("vocabulary", [GAC, UNITE])
@pytest.mark.parametrize("k", [0, 1])
def test_readers_obey_the_laws(vocabulary, k, ensembles):
    check_reader(ensembles[PAIRS[0], vocabulary].model.readers_of_members[k])


@pytest.mark.parametrize("vocabulary", [GAC, UNITE])
def test_every_road_writes_the_same(vocabulary, ensembles, folders, tmp_path):
    ensemble = ensembles[PAIRS[0], vocabulary]
    seeded = {"max_new_tokens": 8, "seed": 3}
    expected = ensemble.generate(PROMPT, **seeded)
    assert "".join(ensemble.stream(PROMPT, **seeded)) == expected
    line = run("generate", PROMPT, "-m", folders["gpt2"], "-m", folders["llama"], "--vocabulary", vocabulary,
               "--max-new-tokens", "8", "--seed", "3")  # fmt: skip
    assert line.stdout == expected + "\n"
    ensemble.save_pretrained(tmp_path)
    assert Ensemble.from_pretrained(tmp_path).generate(PROMPT, **seeded) == expected
    with running(serving_of({"it": ensemble})) as url:
        asked = {"prompt": PROMPT, "max_tokens": 8, "seed": 3, "model": "it", "logprobs": 2}
        told = http.post(f"{url}/v1/completions", json=asked).json()
        assert told["choices"][0]["text"] == expected
        alone = http.post(f"{url}/v1/completions", json={**asked, "softmeet": {"members": [ensemble.names[1]]}})
        assert alone.status_code == (200 if vocabulary == GAC else 400)


def test_gacs_ends_spell_nothing(ensembles):
    """Where the first member lacks another's end, its name is no part of the text."""
    space = ensembles[("gpt2", "llama"), GAC].model.space
    other = space.keys.index("</s>")
    assert other in space.alphabet.ends
    assert space.members[0].read_as(["</s>"]) != [()]
    assert space.alphabet.words[other] == b""


def test_by_unite_a_text_ends_before_another_members_context_is_full(ensembles):
    """Though the first one's next token may be several of the other's."""
    model = ensembles[("gpt2", "llama"), UNITE].model
    reader, tokenizer = model.readers_of_members[1], model.tokenizer_of(1)
    texts = [word.decode(errors="replace") for word in model.space.alphabet.words]
    wide = max(range(len(texts)), key=lambda k: len(tokenizer(texts[k])["input_ids"]))
    row = reader.open(own=model.own_prompt(PROMPT, special=True)[0])
    for _ in range(reader.limit // 3):
        assert not finished(reader.read([Read(row, [wide] * 3, [3])])).errors
        if row.full:
            break
    assert row.full
    assert row.length < reader.limit
    reader.close(row)


@pytest.mark.parametrize("more", [{"prefixes": [[5], None]}, {"prompted": True}])
def test_by_unite_members_have_no_prompts_of_their_own(more, folders, ensembles, monkeypatch):
    members, given = [folders["gpt2"], folders["llama"]], dict(more)
    if given.pop("prompted", None):
        members[1] += "+prompt=In the beginning"
    monkeypatch.setattr("softmeet.ensemble.load_members", None)
    with pytest.raises(InvalidInputError, match="every member reads the first one's text, so that prompts"):
        Ensemble.from_pretrained(members, vocabulary=UNITE, **given)
    with running(serving_of({"it": ensembles[PAIRS[0], UNITE]})) as url:
        passages = {"passages": [{"text": "In the days", "score": 1}, {"text": "Lo", "score": 0.5}]}
        asked = {"prompt": PROMPT, "max_tokens": 2, "model": "it", "softmeet": passages}
        assert http.post(f"{url}/v1/completions", json=asked).status_code == 400
