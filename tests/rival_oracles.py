"""Published ways of ensembling language models by their formulas, in plain numpy: slow, and independent of softmeet.

Weights are not negative and sum to 1; probabilities are fp64. Where a publication leaves a choice open, a docstring
says which is made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = tuple[int, ...]
States = Sequence[State]  # one per member
Key = bytes | None  # the bytes of a token, or None for the end of a text

# Rules on distributions at one position: p is (n, v), w is (n,).


def maximum(p: Array, w: Array) -> Array:
    """Renormalise the pointwise maximum over members of positive weight."""
    top = p[w > 0].max(0)
    return top / top.sum()


def minimum(p: Array, w: Array) -> Array:
    """Renormalise the pointwise minimum over members of positive weight; refuse if it is zero everywhere."""
    least = p[w > 0].min(0)
    if least.sum() == 0:
        raise ValueError("the members share no token")
    return least / least.sum()


def drop(p: Array, w: Array, top: int) -> Array:
    """Average those members whose first choice is among the ``top`` first choices of another; all if none is (EVA).

    Members of no weight neither stay nor vouch for another. Among equal probabilities the first index comes first.
    """
    heard = [i for i in range(len(p)) if w[i] > 0]
    tops = {i: np.argsort(-p[i], kind="stable")[:top].tolist() for i in heard}
    kept = [i for i in heard if any(tops[i][0] in tops[j] for j in heard if j != i)] or heard
    return sum(w[i] * p[i] for i in kept) / sum(w[i] for i in kept)


def core(p: Array, w: Array, main: bool = False) -> Array:
    """Weigh each member by its agreement with the mean, per token and as a whole (CoRE).

    With ``main`` the first member counts as it is, with no less weight than all others together, even if w_0 is 0: two
    of the things that ``core_as_coded`` does. 0 log 0 is 0; other members of no weight take no part.
    """
    mean, floor = w @ p, np.exp(-2.0)
    per_token, as_whole = np.ones_like(p), np.zeros(len(p))
    for i in range(len(p)):
        if w[i] > 0:
            s = (np.exp(-2 * np.abs(p[i] - mean)) - floor) / (1 - floor)
            entropy = -sum(x * math.log(x) for x in p[i].tolist() if x > 0)
            per_token[i] = s / s.mean()
            as_whole[i] = w[i] * s.sum() / (entropy + 1e-12)
    if main:
        as_whole[0] = max(as_whole[0], as_whole[1:].sum())
        per_token[0] = 1
    answer = sum(as_whole[i] * per_token[i] * p[i] for i in range(len(p)))
    return answer / answer.sum()


def core_as_coded(
    z: Array, k: int = 10, maps: Sequence[Array] = (), choice: bool = False, tokens: Sequence[str] | None = None
) -> tuple[Array, int]:
    """Give the scores of the first member's tokens by CoRE's code, unscaled, and the token that it takes.

    Read from zhichenz98/CoRE-EACL26 at 37e815f: logits_processor.py, its variant consist-rbf, at one position. z (n, v)
    has the members' logits, of which the k largest of each are kept. ``maps`` has for each member but the first the
    matrix (v, v) that carries its tokens to those of the first, the identity if there are none. ``choice`` is for the
    tasks ARC-c, MMLU and PIQA. With ``tokens`` the first member's own first choice is taken where it begins the chosen
    one or is begun by it.
    """
    kept = np.where(z >= np.sort(z, 1)[:, -k, None], z, -np.inf)
    p = np.exp(kept - kept.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    if maps:
        p = np.stack([p[0], *(own @ matrix for own, matrix in zip(p[1:], maps, strict=True))])
    possible = p + p[0] > 1e-12
    s = possible * (np.exp(-2 * np.abs(p - p.mean(0))) - np.exp(-2)) / (1 - np.exp(-2))
    per_token = s / s.sum(1, keepdims=True) * (s != 0).sum(1, keepdims=True)
    q = np.maximum(p / np.maximum(p.sum(1, keepdims=True), 1e-12), 1e-12)
    as_whole = (1 if choice else s.sum(1)) / (1e-12 - (q * np.log(q)).sum(1))
    as_whole[0] = max(as_whole[0], as_whole[1:].sum())
    as_whole /= as_whole.sum()
    scores = as_whole[0] * p[0] + sum(as_whole[i] * p[i] * (1 if choice else per_token[i]) for i in range(1, len(p)))
    chosen, own = int(scores.argmax()), int(p[0].argmax())
    if tokens and not choice and (tokens[chosen].startswith(tokens[own]) or tokens[own].startswith(tokens[chosen])):
        chosen = own
    return scores, chosen


# Spaces that members with vocabularies of their own share.


@dataclass(frozen=True)
class TinyMember:
    """Describe a member with a vocabulary of its own.

    ``tokens`` has the bytes of each ordinary id, at least one byte; ``end_ids``, apart from them, end a text.
    ``encode`` cuts bytes into ordinary ids, and ``probs`` gives the probabilities (v,) after some ids. Ids that are
    in neither are never chosen: their mass is lost, and nothing is renormalised for it.
    """

    tokens: dict[int, bytes]
    end_ids: frozenset[int]
    encode: Callable[[bytes], list[int]]
    probs: Callable[[State], Array]


Members = Sequence[TinyMember]


def string_masses(member: TinyMember, state: State) -> dict[Key, float]:
    """Add up a member's next-token probabilities by byte string; None is there if the member has ids of an end."""
    p = member.probs(state)
    masses: dict[Key, float] = {}
    for token in sorted(member.tokens):
        masses[member.tokens[token]] = masses.get(member.tokens[token], 0.0) + float(p[token])
    if member.end_ids:
        masses[None] = sum(float(p[token]) for token in sorted(member.end_ids))
    return masses


def union_distribution(members: Members, states: States, w: Array) -> dict[Key, float]:
    """Mix members over the union of their byte strings, with the end; strings of no mass are listed too."""
    mixed: dict[Key, float] = {None: 0.0}
    for member, state, weight in zip(members, states, w.tolist(), strict=True):
        for u, mass in string_masses(member, state).items():
            mixed[u] = mixed.get(u, 0.0) + weight * mass
    return mixed


def union_feed(member: TinyMember, state: State, u: bytes) -> State:
    """Append the member's own tokens for these bytes; of several where one id has them, the largest such id."""
    same = [token for token, text in member.tokens.items() if text == u]
    cut = tuple(member.encode(u))
    return state + ((max(same),) if same and len(cut) > 1 else cut)


def by_mass(masses: dict[Key, float]) -> list[Key]:
    """Order strings by mass, the largest first; among equals smaller byte strings come first, the end last."""
    return sorted(masses, key=lambda u: (-masses[u], u is None, u or b""))


def union_greedy(members: Members, prompts: States, w: Array, steps: int, k: int | None = None) -> list[Key]:
    """Choose the most probable string ``steps`` times, feeding all members, or until the end, a last None."""
    states, chosen = list(prompts), []
    for _ in range(steps):
        joint = union_distribution(members, states, w) if k is None else top_union_distribution(members, states, w, k)
        u = by_mass(joint)[0]
        chosen.append(u)
        if u is None:
            break
        states = [union_feed(member, state, u) for member, state in zip(members, states, strict=True)]
    return chosen


def top_union_distribution(members: Members, states: States, w: Array, k: int) -> dict[Key, float]:
    """Mix members over the union S of the k most probable strings of each.

    All members add to S, also those of no weight, and also strings of no mass where a member has fewer than k others.
    Each member is renormalised over S; one without mass on S leaves, and the other weights are renormalised. For a
    string that it lacks, a member has the mass of the string of the first of its own tokens for it, or 0 if that string
    is in S; two strings may so count one mass. A member without an end gives the end 0.
    """
    own = [string_masses(member, state) for member, state in zip(members, states, strict=True)]
    S = {u for masses in own for u in by_mass(masses)[:k]}

    def value(i: int, u: Key) -> float:
        if u in own[i]:
            return own[i][u]
        pieces = [] if u is None else members[i].encode(u)
        if not pieces or members[i].tokens[pieces[0]] in S:
            return 0.0
        return own[i][members[i].tokens[pieces[0]]]

    on_S = [{u: value(i, u) for u in S} for i in range(len(members))]
    totals = [math.fsum(values.values()) for values in on_S]
    heard = [i for i in range(len(members)) if w[i] > 0 and totals[i] > 0]
    assert heard
    return {u: float(sum(w[i] * on_S[i][u] / totals[i] for i in heard) / sum(w[i] for i in heard)) for u in S}


def gac_choice(p_by_string: Sequence[dict[str, float]], w: Array) -> dict[str, float]:
    """Sum weighted probabilities over the union of published keys, as GaC does: the largest decides."""
    scores: dict[str, float] = {}
    for p, weight in zip(p_by_string, w.tolist(), strict=True):
        for key, mass in p.items():
            scores[key] = scores.get(key, 0.0) + weight * mass
    return scores


# Ensembles of whole texts.


@dataclass(frozen=True)
class Toy:
    """Describe a model over the symbols 0 to v - 1, of which ``end`` ends a text."""

    v: int
    end: int
    probs: Callable[[State], Array]


def all_texts(toys: Sequence[Toy], most: int) -> list[State]:
    """List the texts that end within ``most`` symbols, the end counted, and those of ``most`` symbols without one."""
    ((v, end),) = {(toy.v, toy.end) for toy in toys}
    others = [x for x in range(v) if x != end]
    ended = [(*x, end) for length in range(most) for x in product(others, repeat=length)]
    return ended + list(product(others, repeat=most))


def text_probability(toy: Toy, text: State) -> float:
    """Multiply the conditional probabilities of a text's symbols, its end included."""
    return math.prod(float(toy.probs(text[:i])[text[i]]) for i in range(len(text)))


def operate(op: str, P: Array, w: Array, order: float | None = None) -> float:
    """Join members' probabilities P (n,) of one text; members of no weight take no part, in min and max neither."""
    P, w = P[w > 0], w[w > 0]
    if op == "product":
        return float(np.prod(P**w))
    if op == "mean":
        return float((w * P).sum())
    if op == "power" and order is not None and order > 0:
        return float((w * P**order).sum() ** (1 / order))
    return float({"min": np.min, "max": np.max}[op](P))


def sequence_ensemble(
    toys: Sequence[Toy], w: Array, op: str, most: int, order: float | None = None
) -> tuple[float, dict[State, float]]:
    """Join the members' probabilities of every text; give their sum Z and the distribution, empty if Z is 0."""
    P = {x: np.array([text_probability(toy, x) for toy in toys]) for x in all_texts(toys, most)}
    joint = {x: operate(op, P[x], w, order) for x in P}
    Z = math.fsum(joint.values())
    return Z, {text: value / Z for text, value in joint.items()} if Z > 0 else {}


# Agreement (ABE): a hypothesis has, per member, ids without the prompt, bytes, whether it ended, log-probability.

Track = tuple[State, bytes, bool, float]
Tracks = tuple[Track, ...]


def agree(tracks: Tracks) -> bool:
    """Say whether all strings are prefixes of the longest, which every ended member has in full."""
    longest = max((text for _, text, _, _ in tracks), key=len)
    return all(longest == text if ended else longest.startswith(text) for _, text, ended, _ in tracks)


def weighed(tracks: Tracks, w: Array, per_token: bool) -> float:
    """Give the weighted log-probability, or that of each member's log-probability per token."""
    return float(w @ np.array([score / max(len(ids), 1) if per_token else score for ids, _, _, score in tracks]))


def one_further(member: TinyMember, prompt: State, track: Track) -> list[Track]:
    """List what a member has after each of its tokens and ends of positive probability."""
    ids, text, _, score = track
    p = member.probs(prompt + ids)
    return [
        ((*ids, token), text + member.tokens.get(token, b""), token in member.end_ids, score + math.log(p[token]))
        for token in sorted(set(member.tokens) | member.end_ids)
        if p[token] > 0
    ]


def extensions(members: Members, prompts: States, tracks: Tracks, eager: bool) -> list[Tracks]:
    """List all hypotheses that agree, one step further; ``agreement_search`` says who takes a token."""
    lengths = [len(text) for _, text, ended, _ in tracks if not ended]
    together = len(lengths) < len(members) or len(set(lengths)) == 1
    bound = max(lengths) - (not together) if eager else min(lengths)
    choices = [
        [track] if track[2] or len(track[1]) > bound else one_further(member, prompt, track)
        for member, prompt, track in zip(members, prompts, tracks, strict=True)
    ]
    return [further for further in product(*choices) if agree(further)]


def agreement_search(
    members: Members, prompts: States, w: Array, beam: int, steps: int, eager: bool = False
) -> tuple[bytes, float]:
    """Search for a text on which members agree that keep their own tokens (ABE); give its bytes and its score.

    In a step, those who have not ended and whose string is as short as any of these take one token each, all at once;
    the others stall. With ``eager``, as in ABE's code, only those at the longest string stall, and nobody who has not
    ended stalls once all are equal or somebody has ended: the two differ from three members on. Every combination of
    tokens of positive probability is tried, and those kept after which the strings agree.

    An end adds no bytes, and counts as a token in score and length. A member may take it if its string is then the
    longest, so that the others' are prefixes of it and those of other ended members equal to it; then it waits for
    the others, who may only complete that string and end. A hypothesis has finished when all have ended; each of
    several ends is a token of its own, and the same text in other tokens is another hypothesis.

    Extensions are gone through by sum_i w_i score_i / length_i, from the largest, of equals first the smaller ids of
    the first member that differs: those that have finished are set aside, others fill the next beam, until it is full.
    Finished ones take no place in the beam, but those that come after it is full are lost. A step in which a member
    stalls adds nothing to its length. The search ends after ``steps`` steps, when nothing can be extended, or with
    ``beam`` finished hypotheses; no bound on scores ends it earlier, and no end is forced. The best has the largest
    sum_i w_i score_i, the first of equals in the order of finishing. Where none has finished, it is the best of the
    last beam that was not empty, and gives its longest string. Members of no weight must agree too.
    """
    beams: list[Tracks] = [(((), b"", False, 0.0),) * len(members)]
    finished: list[Tracks] = []
    for _ in range(steps):
        extended = [further for tracks in beams for further in extensions(members, prompts, tracks, eager)]
        following: list[Tracks] = []
        for tracks in sorted(extended, key=lambda tracks: (-weighed(tracks, w, True), tracks)):
            if beam in (len(following), len(finished)):
                break
            (finished if all(ended for _, _, ended, _ in tracks) else following).append(tracks)
        if not following or len(finished) == beam:
            break
        beams = following
    best = max(finished or beams, key=lambda tracks: weighed(tracks, w, False))
    return max((text for _, text, _, _ in best), key=len), weighed(best, w, False)
