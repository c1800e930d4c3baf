"""Reports on single tokens: the predictions of the ensemble and of each member, and how the rule moved the pool.

p is the ensemble's distribution of the next token, p̂_i member i's, and q the pool. n is the number of members, B that
of positions in a batch, v that of tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.engine.recorder import Recorder
from softmeet.readers.source import Source
from softmeet.rules.solution import Solution
from softmeet.solvers.base import Status

# Nats; from this disagreement on, summed over the members, a token has the full colour.
_FULL = 0.5


@dataclass(frozen=True)
class NextToken:
    """The ensemble's prediction of the token after a prompt (over bytes, of the byte), beside each member's own.

    Attributes:
        top: (text, probability) of the ensemble's most probable tokens (bytes), the most probable first.
        members: by each member's name, the same list for that member's own distribution.
        solution: the log-probabilities of all tokens in nats, (1, v), with status and gap.
        sources: where in each of the user's files the most of the last tokens of the prompt stand.
    """

    top: list[tuple[str, float]]
    members: dict[str, list[tuple[str, float]]]
    solution: Solution
    sources: list[Source | None] = field(default_factory=list)


@dataclass(frozen=True)
class TokenReport:
    """A report on one position and the token that came there; log-probabilities, divergences and gap are in nats.

    A member that did not run, as the gate ``unsure`` was closed, has NaN for figures, and an empty ``member_top``.

    Attributes:
        token: the id of the token that came.
        log_prob: its log-probability by the ensemble.
        pool_log_prob: its log-probability by the pool, the average of the members.
        member_log_probs: its log-probability by each member, in the members' order, as in the other lists.
        top: the ensemble's most probable tokens, as (id, log-probability), the most probable first.
        member_top: the same for each member: its own most probable tokens.
        unseen: for each member the probability of all tokens that it does not tell, which are left out of the mix: 0
            but for a model behind a server.
        moved: the tokens j with the largest |p_j - q_j|, p the ensemble's distribution and q the pool, as (id, log q_j,
            log p_j), the largest first. If ``gated``, nothing was moved: arbitrary tokens as (id, log p_j, log p_j).
        pushes: ``pushes[k][i]`` is member i's contribution push_ij, by its dual variables, to the change of token j,
            the k-th of ``moved``: log p_j - log q_j = Σ_i push_ij + a constant. 0 if the rule, unlike ``meet``,
            does not tilt the pool.
        disagreement: for each member, KL(r_i‖p̂_i) of its corrected distribution r_i and its own p̂_i, or an upper bound
            of it.
        disagreement_is_bound: for each member, whether ``disagreement`` is the upper bound KL(p‖p̂_i).
        status: how the solver ended, the name of a :class:`softmeet.Status`.
        fallback: whether there was no feasible distribution, so that the fallback answered.
        gap: how far the answer can be from its optimum; inf if nothing is known.
        gap_is_certified: whether ``gap`` is a proved bound rather than an estimate.
        num_passes: how many times the solver read all heads; reads of a part of their rows count as fractions.
        gated: whether a gate was closed, so that the rule was not solved.
        claims: the share of the answer that each of the user's files (readers that claim) took, in their order.
        sources: where in each of these the most of the last tokens stand, this one included; None if it does nowhere.
    """

    token: int
    log_prob: float
    pool_log_prob: float
    member_log_probs: list[float]
    top: list[tuple[int, float]]
    member_top: list[list[tuple[int, float]]]
    unseen: list[float]
    moved: list[tuple[int, float, float]]
    pushes: list[list[float]]
    disagreement: list[float]
    disagreement_is_bound: list[bool]
    status: str
    fallback: bool
    gap: float
    gap_is_certified: bool
    num_passes: float
    gated: bool = False
    claims: list[float] = field(default_factory=list)
    sources: list[Source | None] = field(default_factory=list)

    def spelled(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the report as a dict for JSON: its attributes by name, and ``text``, the text of ``token``.

        In ``top``, ``member_top`` and ``moved`` each id is replaced by its text; ``token`` stays an id.

        Args:
            tokenizer: the ensemble's tokenizer, which decodes the ids.
        """
        return self.with_texts(partial(_decoded, tokenizer))

    def with_texts(self, text: Callable[[int], str]) -> dict[str, Any]:
        """Return what :meth:`spelled` does, with a function that returns the text of an id."""
        return vars(self) | {
            "text": text(self.token),
            "top": [[text(j), x] for j, x in self.top],
            "member_top": [[[text(j), x] for j, x in rows] for rows in self.member_top],
            "moved": [[text(j), before, after] for j, before, after in self.moved],
            "sources": [one and asdict(one) for one in self.sources],
        }


@lru_cache(maxsize=1 << 16)
def _decoded(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))


def token_report(solution: Solution, log_probs: Float[Tensor, "n B v"], row: int, token: int, top: int) -> TokenReport:
    """Report on one position of a solved batch, and the token that came there.

    Args:
        solution: the solution of a batch of B positions, as :meth:`Combiner.solve_rows` returns it.
        log_probs: (n, B, v), the members' log-probabilities in nats there, which the same call returns; NaN for a
            member that did not run.
        row: the number of the position in the batch, from 0 to B - 1.
        token: the id of the token that came there.
        top: how many tokens to list in ``top``, ``moved`` and each member's ``member_top``.
    """
    ours = solution.log_probs[row]
    pool = ours if solution.gated[row] else solution.pool[row]
    change = (ours.exp() - pool.exp()).abs().topk(min(top, len(ours))).indices.tolist()
    return TokenReport(
        token=token,
        log_prob=ours[token].item(),
        pool_log_prob=pool[token].item(),
        member_log_probs=log_probs[:, row, token].tolist(),
        top=most_probable(ours, top),
        member_top=[[] if member[token].isnan() else most_probable(member, top) for member in log_probs[:, row]],
        unseen=(-torch.expm1(log_probs[:, row].logsumexp(-1))).clamp_min(0).abs().tolist(),
        moved=list(zip(change, pool[change].tolist(), ours[change].tolist(), strict=True)),
        pushes=_pushes(solution, row, change),
        disagreement=solution.disagreement[:, row].tolist(),
        disagreement_is_bound=solution.disagreement_is_bound[:, row].tolist(),
        status=Status(int(solution.status[row])).name,
        fallback=bool(solution.fallback[row]),
        gap=solution.gap[row].item(),
        gap_is_certified=bool(solution.gap_is_certified[row]),
        num_passes=solution.num_passes[row].item(),
        gated=bool(solution.gated[row]),
        claims=[] if solution.claims is None else solution.claims[:, row].tolist(),
    )


def _pushes(solution: Solution, row: int, tokens: list[int]) -> list[list[float]]:
    """Compute the pushes of :class:`TokenReport`, (tokens, members), in nats; 0 if the rule does not tilt the pool."""
    problem, dual = solution.problem, solution._answer.dual
    columns = [torch.zeros(len(tokens), dtype=torch.float64)] * len(dual)
    if problem.settings.rule.tilts_pool and tokens:
        where, rows = torch.tensor([tokens], device=problem.log_p.device), torch.tensor([row])
        views = problem.views(range(len(dual)))
        columns = [v.take(rows).rows(where)[0].double() @ lam[row] for v, lam in zip(views, dual, strict=True)]
    return torch.stack(columns, dim=-1).tolist()


def heat(disagreement: Sequence[float]) -> float:
    """Map the members' disagreement in nats to the strength of a colour: its sum over 0.5 nats, at most 1.

    Members that did not run have NaN, and are left out.

    Example:
        >>> heat([0.1, 0.15]), heat([3.0, float("nan")])
        (0.5, 1.0)
    """
    return min(known_sum(disagreement) / _FULL, 1.0)


def style(nats: float) -> str:
    """Return rich's style for text at which the members disagree by so many nats, summed over them: none for 0.

    Example:
        >>> style(0.0), style(0.25)
        ('', '#ffffff on rgb(130,35,40)')
    """
    hot = heat([nats])
    return f"#ffffff on rgb({int(40 + 180 * hot)},{int(70 * (1 - hot))},40)" if hot else ""


def known_sum(disagreement: Sequence[float]) -> float:
    """Sum the members' disagreement, in nats; members that did not run have NaN, and are left out.

    Example:
        >>> known_sum([0.25, float("nan")])
        0.25
    """
    return sum(x for x in disagreement if not math.isnan(x))


def shown(text: str) -> str:
    """Return a token's text with visible signs: ``␣`` for each space and ``⏎`` for each line feed.

    Example:
        >>> shown(" a")
        '␣a'
    """
    return text.replace(" ", "␣").replace("\n", "⏎")


def most_probable(log_p: Float[Tensor, " v"], count: int) -> list[tuple[int, float]]:
    """List the ``count`` most probable tokens as (id, log-probability in nats), the most probable first.

    Example:
        >>> most_probable(torch.tensor([0.0, 1.0, 0.0]).log(), 1)
        [(1, 0.0)]
    """
    best = log_p.topk(min(count, len(log_p)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class TokenReports(Recorder):
    """A recorder that keeps every position's solution, (n + 2) v numbers in memory each, so that it can report on each.

    Pass it to ``generate`` as ``recorder=``. With beam search also pass ``return_dict_in_generate`` and
    ``output_scores``: ``generate`` then returns the ``beam_indices`` that :meth:`of` needs.

    Args:
        top: how many tokens a report lists in ``top``, ``moved`` and each member's ``member_top``.
    """

    def __init__(self, top: int = 5) -> None:
        super().__init__()
        self.top = top
        self._kept: list[tuple[Solution, Float[Tensor, "n B v"], int]] = []
        # The numbers of the positions of each sequence of a batch.
        self._of = defaultdict[int, list[int]](list)

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Count the rows of a solution of B positions, and keep it with the members' log-probabilities, (n, B, v)."""
        super().add(solution, log_probs)
        for row, sequence in enumerate(self.came(solution.status.numel())):
            self._of[sequence].append(len(self._kept) + row)
        self._kept += [(solution, log_probs, row) for row in range(solution.status.numel())]

    def of(
        self, generated: Sequence[Sequence[int]], rows: int, beam_indices: Int[Tensor, "s t"] | None = None
    ) -> list[list[TokenReport]]:
        """Report on generated sequences: return a list for each of them, with a report for each token.

        The recorder has to be a new one that was passed to this one call of ``generate`` only.

        Args:
            generated: the ids of the new tokens of each sequence, without prompt and padding.
            rows: the batch size of each forward pass: the number of prompts times that of beams or, without beam
                search, times ``num_return_sequences``.
            beam_indices: (s, t), for each sequence and token the row of the pass that predicted it, as ``generate``
                returns them; None without beam search.
        """
        found = []
        for s, tokens in enumerate(generated):
            sources = [s] * len(tokens) if beam_indices is None else beam_indices[s].tolist()
            places = self._of.get(s) or [t * rows + sources[t] for t in range(len(tokens))]
            found.append([self.at(places[t], token) for t, token in enumerate(tokens)])
        return found

    def at(self, index: int, token: int) -> TokenReport:
        """Report on the position that was solved as number ``index``, and the ``token``, an id, that came there.

        Positions are numbered from 0, over all calls that the recorder was passed to, in the order of the forward
        passes and, in a pass, of its rows.

        Raises:
            IndexError: if there is no such position.
        """
        return token_report(*self._kept[index], token, self.top)
