"""What an ensemble and its members predict: behind a prompt, and at each token, byte or stretch of a text.

A stretch is the text between two neighbouring places at which every member's tokenizer cuts it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError
from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.prompts import encoded, states_behind
from softmeet.hf.report import NextToken, TokenReport, TokenReports, most_probable
from softmeet.hf.vocabulary import require_unicode
from softmeet.members.spelling import Spelling
from softmeet.readers.byte_alphabet import shown_byte
from softmeet.readers.bytes.byte_member import ByteMember
from softmeet.readers.bytes.next_tokens import END
from softmeet.readers.source import Source
from softmeet.rules.problem import TokensBefore

# (symbol or token as text, log-probability in nats), the most probable first.
Listed = list[tuple[str, float]]


@dataclass(frozen=True)
class GroupReport:
    """A report on a stretch of text that every member reads as whole tokens; all figures are in nats.

    Attributes:
        text: the stretch.
        log_prob: the ensemble's log-probability of the stretch's bytes, given the text before.
        member_log_probs: each member's log-probability of these bytes, in the members' order.
        top: the ensemble's most probable first bytes of the stretch, as (:func:`shown_byte`, log-probability), the most
            probable first.
        member_top: each member's most probable tokens at the start of the stretch, as (text, log-probability), the
            most probable first; empty at the start of the text for a member whose tokenizer drops the first byte.
        disagreement: each member's disagreement KL(p‖p̂_i), of the ensemble's p and the member's p̂_i over the next
            byte, summed over the stretch's bytes.
        claims: the share of the answer that each of the user's files took, in the mean of the stretch's bytes.
        sources: where in each of these the most of the last bytes stand, the stretch's included.
    """

    text: str
    log_prob: float
    member_log_probs: list[float]
    top: Listed
    member_top: list[Listed]
    disagreement: list[float]
    claims: list[float] = field(default_factory=list)
    sources: list[Source | None] = field(default_factory=list)

    def spelled(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the report as a dict for JSON: its own fields and, as constants, those of :class:`TokenReport`.

        The constants say that the rule, which over bytes is an average, moved no pool, read no head and is exact. There
        is no ``token``, as a stretch may be several. ``tokenizer`` is unused.
        """
        return asdict(self) | {
            "pool_log_prob": self.log_prob,
            "moved": [],
            "pushes": [],
            "disagreement_is_bound": [False] * len(self.disagreement),
            "status": "OPTIMAL",
            "fallback": False,
            "gap": 0.0,
            "gap_is_certified": True,
            "num_passes": 0.0,
            "gated": False,
        }


def group_reports(model: ByteEnsembleForCausalLM, text: bytes, top: int, given: int | None = None) -> list[GroupReport]:
    """Report on each stretch of a text, in order: those between places at which every member's tokenizer cuts it.

    Args:
        model: the ensemble.
        text: the text in valid UTF-8, at least one byte.
        top: how many bytes or tokens to list in each report's ``top`` and in each member's ``member_top``.
        given: how many first bytes were given to readers that claim, not drawn; None for all.

    Returns:
        The reports; their ``text`` joined is the whole text. The model's own settings hold, without prefixes of a call.

    Raises:
        InvalidInputError: if the text exceeds a member's context.
    """
    first = None if given is None else given + 1  # with what begins the text
    states = [own[:-1] for own in model.hidden_states(torch.tensor([[END, *text]]), first)]
    log_probs = torch.stack(states[: len(model.members)])
    expected = [expected_tokens(reader, text, top) for reader in model.readers]
    solutions = [part.solved[1] for part in model.combiner.combined(states, model.settings)]
    answer = torch.cat([solution.log_probs for solution in solutions])
    apart = torch.cat([solution.disagreement for solution in solutions], -1)
    claims = [own[:, -1].exp() for own in states[len(log_probs) :]]
    # The first stretch begins at the first byte even if a member's tokenizer drops it.
    places = sorted({0}.union(set.intersection(*(set(found) for found in expected))))
    places = [place for place in places if text[place] & 0xC0 != 0x80]
    symbols = torch.tensor(list(text))
    came = answer.gather(-1, symbols[:, None]).squeeze(-1)
    members = log_probs.gather(-1, symbols.expand(len(log_probs), -1)[..., None]).squeeze(-1)
    found = []
    for start, end in zip(places, [*places[1:], len(text)], strict=True):
        rows = slice(start, end)
        found.append(
            GroupReport(
                text=text[rows].decode(),
                log_prob=came[rows].sum().item(),
                member_log_probs=members[:, rows].sum(-1).tolist(),
                top=[(shown_byte(k), x) for k, x in most_probable(answer[start], top)],
                member_top=[own.get(start, []) for own in expected],
                disagreement=apart[:, rows].sum(-1).tolist(),
                claims=[own[rows].mean().item() for own in claims],
                sources=[reader.source(list(text[:end])) for reader in model.claimants],
            )
        )
    return found


def character_reports(reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join reports of single bytes to one for each whole character of the text.

    Log-probabilities, disagreement and passes are summed, and claims averaged; what is listed is what was listed at the
    first byte. Each has a further field, ``unit``: "character". The bytes of a last character that is not whole yet are
    left out.

    Args:
        reports: as :meth:`softmeet.hf.report.TokenReport.with_texts` returns them.
    """
    found, held = list[dict[str, Any]](), list[dict[str, Any]]()
    for report in reports:
        held.append(report)
        text, used = codecs.utf_8_decode(bytes(r["token"] for r in held if r["token"] != END), "replace", False)
        if used or report["token"] == END:
            found.append(_joined(held, text or shown_byte(END)))
            held = []
    return found


def _joined(reports: Sequence[dict[str, Any]], text: str) -> dict[str, Any]:
    sums = {name: sum(r[name] for r in reports) for name in ("log_prob", "pool_log_prob", "num_passes")}
    by_member = {
        name: [sum(own) for own in zip(*(r[name] for r in reports), strict=True)]
        for name in ("member_log_probs", "disagreement")
    }
    claims = [fmean(own) for own in zip(*(r["claims"] for r in reports), strict=True)]
    return reports[0] | sums | by_member | {"claims": claims, "text": text, "unit": "character"}


def expected_tokens(reader: ByteMember, text: bytes, top: int) -> dict[int, Listed]:
    """List a member's most probable tokens at each place at which one begins, as its tokenizer cuts a text.

    The text follows ``reader.prefix``; InvalidInputError if both have more tokens than the model's context.

    Args:
        reader: the member.
        text: any bytes.
        top: the number of tokens to list at each place.

    Returns:
        A dict from the index in ``text`` of the first byte of each of its tokens to ``top`` pairs (token as text, or
        ``<id>`` if it spells nothing; log-probability in nats), the most probable first.
    """
    spelling = reader.spelling
    tokens = spelling.encode(text) if text else []
    behind = reader.run_chain(reader.prefix, tokens, range(len(tokens)))
    # Indices in the text of the bytes that tokens spell: it may have bytes without a token, and no dummy prefix.
    seen = [k for k, byte in enumerate(text) if byte not in spelling.unwritable]
    found = {}
    for place, one in zip(spelling.bounds(tokens)[:-1].tolist(), behind, strict=True):
        log_p = reader.logits([one])[0].log_softmax(-1)
        listed = [(_named(spelling, k), x) for k, x in most_probable(log_p, top)]
        found[seen[max(0, place - len(spelling.dummy))]] = listed
    return found


def _named(spelling: Spelling, token: int) -> str:
    """Return a token as text, bytes that are not UTF-8 with backslash escapes; ``<id>`` if it spells nothing."""
    word = spelling.spelled([token])
    return word.decode(errors="backslashreplace") if word else f"<{token}>"


def next_token(model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, top: int) -> NextToken:
    """Predict what follows a text, as :meth:`softmeet.Ensemble.next_token` does."""
    if type(top) is not int or top < 1:
        raise InvalidInputError(f"expected top as a number of tokens above 0, got {top!r}")

    def likeliest(log_probs: torch.Tensor) -> list[tuple[str, float]]:
        best = log_probs.exp().topk(min(top, len(log_probs)))
        named = shown_byte if model.over_bytes else lambda i: tokenizer.decode([i])
        return [(named(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    inputs = encoded(model, tokenizer, [text])
    hidden = states_behind(model, inputs)
    before = TokensBefore.of(inputs["input_ids"][:, -1], tokenizer)
    log_probs, solution = model.combiner.solve_rows(hidden, model.combiner.resolved(model.settings), before=before)
    members = {name: likeliest(own[0]) for name, own in zip(model.config.members, log_probs, strict=True)}
    symbols = inputs["input_ids"][0].tolist()
    sources = [reader.source(symbols) for reader in model.claimants]
    return NextToken(likeliest(solution.log_probs[0]), members, solution, sources)


def reports_of(
    model: EnsembleForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, top: int, given: int | None = None
) -> list[TokenReport] | list[GroupReport]:
    """Report on every token of a text, as :meth:`softmeet.Ensemble.inspect` does."""
    if isinstance(model, ByteEnsembleForCausalLM):
        require_unicode(text)
        if not text:
            raise InvalidInputError("expected a text of at least one byte, got an empty one")
        return group_reports(model, text.encode(), top, given)
    model.require_likelihood("a report on a text")
    inputs = encoded(model, tokenizer, [text])
    tokens = inputs["input_ids"][0, 1:]
    if not len(tokens):
        raise InvalidInputError(f"expected a text of at least two tokens, got {text!r}")
    reports = TokenReports(top)
    # All members run at every position, so that they can be reported, also where a gate is closed.
    hidden = [states[:-1] for states in model.hidden_states(inputs["input_ids"], given)]
    for part in model.combiner.combined(hidden, model.combiner.resolved(model.settings)):
        part.tell(reports)
    found = [reports.at(row, token) for row, token in enumerate(tokens.tolist())]
    ids = inputs["input_ids"][0].tolist()
    if not model.claimants:
        return found
    each = ([reader.source(ids[: row + 2]) for reader in model.claimants] for row in range(len(found)))
    return [replace(one, sources=own) for one, own in zip(found, each, strict=True)]
