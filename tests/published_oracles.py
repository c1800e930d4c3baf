"""GaC and UniTE over strings exactly as their published code has them, defects included: in numpy, slow and naive.

Read from GaC at bbb2567 and UniTE's unite2.py at 106a895, one text at a time. What that code leaves open is stated in
the docstrings: the order of a Python set, and of equal logits in a top k. Errors that it raises are raised here too,
as the same kind of error where that is easy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import transformers as tf
from numpy.typing import NDArray
from rival_oracles import gac_choice

Array = NDArray[np.float64]
State = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PublishedMember:
    """Describe a member by its fast tokenizer and the logits (v,) of the token that follows some ids.

    ``blank`` is the id of a lone space, which UniTE has as a constant per family (``BLANKS``, if None): only for an
    empty key, which no usual vocabulary brings about. Ids of v that are no token are ignored by GaC, and break UniTE.
    """

    tokenizer: tf.PreTrainedTokenizerFast
    logits: Callable[[State], Array]
    blank: int | None = None


Members = Sequence[PublishedMember]
States = Sequence[State]  # one per member


def softmax(z: Array) -> Array:
    """Normalise logits in fp64; the published code has fp32."""
    shares = np.exp(np.asarray(z, np.float64) - np.max(z))
    return shares / shares.sum()


# GaC. A key is a string of the union; it is an ordinary string, or one of <0x00> ... <0xFF> as these six characters.

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHANUMERIC = {BYTES[ord(c)]: c for c in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"}
OTHER_ENDS = ("<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|end|>")


def more_g(vocabulary: dict[str, int]) -> bool:
    """Say whether more strings begin with Ġ than with ▁: only then a vocabulary counts as byte-level."""
    return sum(t.startswith("Ġ") for t in vocabulary) > sum(t.startswith("▁") for t in vocabulary)


@cache
def gac_bytes(tokenizer: tf.PreTrainedTokenizerFast) -> dict[str, int]:
    """Give a tokenizer's ids of the byte keys.

    A byte-level one has 128: for every ASCII character the first piece of it as a text. Any other must have all 256 in
    its vocabulary, but for <0x09>, which it may lack.
    """
    vocabulary = tokenizer.get_vocab()
    if more_g(vocabulary):
        pieces = [tokenizer.tokenize(chr(byte)) for byte in range(128)]
        return {BYTES[byte]: tokenizer.convert_tokens_to_ids(pieces[byte])[0] for byte in range(128)}
    if lacking := [key for key in BYTES if key not in vocabulary and key != "<0x09>"]:
        raise ValueError(f"a vocabulary without {lacking}")
    return {key: vocabulary[key] for key in BYTES if key in vocabulary}


def gac_strings(tokenizer: tf.PreTrainedTokenizerFast) -> dict[int, str]:
    """Spell all tokens but those of the byte keys.

    In a byte-level vocabulary every Ġ is a space and every Ċ a newline, and no other letter is decoded: "é" stays "Ã©"
    and a tab in a longer token "ĉ". In another every ▁ of a token that begins with one is a space. Which it is, is
    counted anew without the byte keys' tokens. If two byte keys share an id, or an id has two strings, this fails.
    """
    rest, spellings = tokenizer.get_vocab(), {}
    for string, token in rest.items():
        spellings.setdefault(token, []).append(string)
    for token in gac_bytes(tokenizer).values():
        same = spellings.pop(token, [])
        if len(same) != 1:
            raise ValueError(f"id {token} of a byte has the strings {same}")
        del rest[same[0]]
    if more_g(rest):
        return {token: string.replace("Ġ", " ").replace("Ċ", "\n") for string, token in rest.items()}
    return {token: string.replace("▁", " ") if string[:1] == "▁" else string for string, token in rest.items()}


def gac_union(members: Members) -> list[dict[int, str]]:
    """Give every member's keys by id; the union is all of them with all 256 byte keys.

    A byte-level vocabulary's single ASCII characters have byte keys, its lone space <0x20> too; a SentencePiece's own
    characters do not: "." and <0x2E> are two keys, and " " and <0x20>. Beside a member that is not byte-level, its
    letters and digits have themselves as keys instead; one that no member spells so is a KeyError.
    """
    keys = [gac_strings(member.tokenizer) for member in members]
    union = set(BYTES).union(*(strings.values() for strings in keys))
    bytes_of = [gac_bytes(member.tokenizer) for member in members]
    all_byte_level = all(len(ids) == 128 for ids in bytes_of)
    for strings, ids in zip(keys, bytes_of, strict=True):
        for key, token in ids.items():
            if len(ids) == 128 and not all_byte_level and key in ALPHANUMERIC:
                if ALPHANUMERIC[key] not in union:
                    raise KeyError(ALPHANUMERIC[key])
                strings[token] = ALPHANUMERIC[key]
            else:
                strings[token] = key
    return keys


def gac_ends(members: Members) -> frozenset[str]:
    """List the keys that end: every member's end as its tokenizer spells it, and four names, in whose vocabulary ever.

    GaC first sets a tokenizer's end to the (first) one of the model's generation config: that is the caller's.
    """
    return frozenset([member.tokenizer.eos_token for member in members if member.tokenizer.eos_token]) | set(OTHER_ENDS)


@cache
def gac_prefix(tokenizer: tf.PreTrainedTokenizerFast) -> str:
    """Give the text before which a key is encoded: "" in a byte-level vocabulary, "¢" in one of 256,000.

    Else the shortest ▁-token that is in no other ▁-token, has one ▁ and is not blank, without its ▁; by order of
    characters if there are several.
    """
    vocabulary = tokenizer.get_vocab()
    if tokenizer.vocab_size == 256000:
        return "¢"
    if more_g(vocabulary):
        return ""
    begun = [string for string in vocabulary if string.startswith("▁") and string != "▁"]
    for string in sorted(begun, key=lambda string: (len(string), string)):
        alone = not any(string in other for other in begun if other != string)
        if alone and string.count("▁") == 1 and string[1:].strip():
            return string[1:]
    raise ValueError("no ▁-token stands alone")


def gac_tokens(member: PublishedMember, key: str, ends: frozenset[str] = frozenset()) -> list[int]:
    """Give the ids that a member is fed for a key.

    An end is the member's own. A byte key that the member has is its id. All else is encoded as a text, special tokens
    being read in it: after the prefix, of which the ids are cut off if they begin the result and something is left;
    else after ";" likewise; else alone. No member looks for the key in its own vocabulary: it may read other ids than
    the one whose mass chose the key. A byte-level one reads <0x80> and above as six characters, and its own "Ã©" as
    two letters.
    """
    tokenizer = member.tokenizer
    if key in ends:
        if tokenizer.eos_token_id is None:
            raise ValueError("a member without an end is fed one")
        return [tokenizer.eos_token_id]
    if key in gac_bytes(tokenizer):
        return [gac_bytes(tokenizer)[key]]
    for prefix in (gac_prefix(tokenizer), ";"):
        before = tokenizer.encode(prefix, add_special_tokens=False)
        both = tokenizer.encode(prefix + key, add_special_tokens=False)
        if both[: len(before)] == before and len(both) > len(before):
            return both[len(before) :]
    return tokenizer.encode(key, add_special_tokens=False)


def gac_masses(member: PublishedMember, state: State, strings: dict[int, str]) -> dict[str, float]:
    """Add up a member's probabilities by key; an id without a key loses its mass, a key without logit is an error."""
    p = softmax(member.logits(state))
    masses: dict[str, float] = {}
    for token in sorted(strings):
        masses[strings[token]] = masses.get(strings[token], 0.0) + float(p[token])
    return masses


def gac_scores(members: Members, states: States, w: Array) -> dict[str, float]:
    """Mix the members' probabilities over the union, keys of no mass included; the ends are keys as others."""
    return gac_mixed(members, states, w, gac_union(members))


def gac_mixed(members: Members, states: States, w: Array, union: list[dict[int, str]]) -> dict[str, float]:
    """Do so with the members' keys by id at hand, of these members alone: in a gated step, the one that chooses."""
    masses = [gac_masses(*each) for each in zip(members, states, union, strict=True)]
    return dict.fromkeys(BYTES, 0.0) | gac_choice(masses, np.asarray(w, np.float64))


def gac_append(member: PublishedMember, state: State, tokens: list[int]) -> State:
    """Append ids; if there are several, pads at the beginning of the state are lost, though they be of the prompt.

    The pad is the tokenizer's, or its end if it has none (GaC has the generation config's in the first case).
    """
    longer = (*state, *tokens)
    if len(tokens) <= 1:
        return longer
    pad = member.tokenizer.pad_token_id
    pad = member.tokenizer.eos_token_id if pad is None else pad
    return longer[next(i for i, token in enumerate(longer) if token != pad) :]


def gac_greedy(
    members: Members,
    prompts: States,
    w: Array,
    steps: int,
    threshold: float | None = None,
    *,
    primary: int = 0,
    max_new_tokens: int | None = None,
) -> tuple[list[str], list[State]]:
    """Choose the key of most mass and feed it to all, ``steps`` times or until an end; give keys, and states after.

    All end once any member has been fed its own end, or, with ``max_new_tokens``, once any member's state is that much
    longer than its prompt; the last key is then among those chosen and has been fed. With a ``threshold`` the
    ``primary`` alone chooses where its largest probability of an id, not of a key, is above it. GaC takes the first of
    equal keys in the order of a set, which differs between runs; here it is the smallest string.
    """
    ends, union = gac_ends(members), gac_union(members)
    states, chosen = [tuple(prompt) for prompt in prompts], []
    for _ in range(steps):
        top = softmax(members[primary].logits(states[primary])).max()
        alone = threshold is not None and w[primary] * top > threshold * w[primary]
        who = [primary] if alone else range(len(members))
        scores = gac_mixed([members[i] for i in who], [states[i] for i in who], w[list(who)], [union[i] for i in who])
        key = max(sorted(scores), key=scores.__getitem__)
        chosen.append(key)
        fed = [gac_tokens(member, key, ends) for member in members]
        states = [gac_append(*each) for each in zip(members, states, fed, strict=True)]
        longer = [len(state) - len(prompt) for state, prompt in zip(states, prompts, strict=True)]
        ended = any(member.tokenizer.eos_token_id in tokens for member, tokens in zip(members, fed, strict=True))
        if ended or (max_new_tokens is not None and max(longer) >= max_new_tokens):
            break
    return chosen, states


# UniTE. A member is of the branch of "llama2" (sentencepiece) or of those of "qwen2" and "llama3" (byte-level).

SENTENCEPIECE, BYTE_LEVEL = "sentencepiece", "byte-level"
BLANKS = {SENTENCEPIECE: 29871, BYTE_LEVEL: 220}
Table = dict[str, tuple[float, int]]  # a key's logit and id


def unite_key(token: str) -> str:
    """Spell a token as UniTE does in every branch: ▁ as Ġ, and <0x0A> and Ċ as "/n", wherever they are in it."""
    return token.replace("▁", "Ġ").replace("<0x0A>", "/n").replace("Ċ", "/n")


def unite_top(member: PublishedMember, z: Array, k: int) -> Table:
    """Give the keys of the k largest logits, from the largest; of equal logits the smaller id comes first (a choice).

    Where two tokens have one key, it stands at the first one's place with the second one's logit and id: the smaller.
    An id that is no token is an error, as in UniTE.
    """
    if k > len(z):
        raise ValueError("fewer logits than k")
    table: Table = {}
    for token in np.argsort(-z, kind="stable")[:k].tolist():
        table[unite_key(member.tokenizer.convert_ids_to_tokens(token))] = (float(z[token]), token)
    return table


def unite_missing(member: PublishedMember, key: str, kind: str) -> int:
    """Give the id that stands for a key which a member's top k lacks.

    A SentencePiece vocabulary is asked for the key with ▁ for every Ġ. If it has the key (or an unknown token whose id
    is not 0) that id stands. Else it is the first piece of the key read as a text, with Ġ, ▁ and "/n" as these
    characters: the lone space that a tokenizer puts before a text counts as a piece, since UniTE's rule that should
    skip it is undone by an ``else`` that belongs to its last family alone. Id 0 is looked up by pieces too.
    """
    if kind == SENTENCEPIECE:
        key = key.replace("Ġ", "▁")
    if not key:
        return BLANKS[kind] if member.blank is None else member.blank
    token = member.tokenizer.convert_tokens_to_ids(key)
    if token in (0, None):
        pieces = member.tokenizer.convert_tokens_to_ids(member.tokenizer.tokenize(key))
        token = pieces[0] if pieces else token
    if token is None:
        raise ValueError(f"no piece for {key!r}")
    return int(token)


def unite_tables(members: Members, states: States, kinds: Sequence[str], k: int = 10) -> list[Table]:
    """Give every member's logits and ids on the union of their k largest logits' keys, its own first, from the largest.

    Beside the "llama2" branch, a missing key whose id stands for a key already has the logit 0, be that large or small,
    which leaves the first such key the logit. Missing keys come in the order of a set in UniTE, which differs between
    runs and decides who is first; here they come sorted.
    """
    found = [np.asarray(member.logits(state), np.float64) for member, state in zip(members, states, strict=True)]
    tables = [unite_top(member, z, k) for member, z in zip(members, found, strict=True)]
    union = sorted(set().union(*tables))
    for member, z, table, kind in zip(members, found, tables, kinds, strict=True):
        taken = {token for _, token in table.values()}
        for key in union:
            if key not in table:
                token = unite_missing(member, key, kind)
                free = kind == SENTENCEPIECE or token not in taken
                table[key] = (float(z[token]) if free else 0.0, token)
                taken.add(token)
    return tables


def unite_means(tables: Sequence[Table], w: Array) -> dict[str, float]:
    """Softmax every member's logits on the union and average them, in the first member's order."""
    shares = [
        dict(zip(table, softmax(np.array([z for z, _ in table.values()])).tolist(), strict=True)) for table in tables
    ]
    return {key: sum(float(v) * share[key] for v, share in zip(w, shares, strict=True)) for key in tables[0]}


def unite_greedy(
    members: Members,
    prompt: str,
    w: Array,
    steps: int,
    k: int = 10,
    kinds: Sequence[str] = (SENTENCEPIECE, BYTE_LEVEL),
) -> tuple[list[str], list[State]]:
    """Choose the key of most mass ``steps`` times; give the keys, and the states after.

    All first read the prompt with the special tokens that they add. After a step the first member appends its own id
    of the key, which may be no more than a first piece of it, or another's; all others read its whole text anew,
    special tokens written out, with their own added again. Nothing ends a text: ends are keys as others.
    """
    states = [tuple(member.tokenizer(prompt)["input_ids"]) for member in members]
    chosen = []
    for _ in range(steps):
        tables = unite_tables(members, states, kinds, k)
        scores = unite_means(tables, np.asarray(w, np.float64))
        key = max(scores, key=scores.__getitem__)
        chosen.append(key)
        first = (*states[0], tables[0][key][1])
        text = members[0].tokenizer.decode(list(first))
        states = [first, *(tuple(member.tokenizer(text)["input_ids"]) for member in members[1:])]
    return chosen, states
