"""What happened at a token: who expected what, what the rule did about it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.hf.recorder import Recorder
from softmeet.rules.solution import Solution
from softmeet.solvers.base import Status

# Nats of summed disagreement at which a token is fully coloured.
_FULL = 0.5


@dataclass(frozen=True)
class TokenReport:
    """One position and the token that came there; log-probabilities, disagreement and gaps are in nats.

    Where a gate was closed (``gated``) nothing moved; members that were not asked have NaN and an empty list.

    Attributes:
        token: the id that came.
        log_prob, member_log_probs: its, by the ensemble and by each member.
        top, member_top: (id, log-probability), the most probable first.
        moved: (id, log-probability in the pool, in the answer), the largest change of probability first.
        pushes: for each of ``moved``, each member's part in it: log p_j - log q_j = Σ_i push_ij + a constant, where a
            push is u_ij less its mean over the vocabulary.
        disagreement, disagreement_is_bound: each member's, and whether it is only known to be no larger.
        status, fallback, gap, gap_is_certified, num_passes: as of :class:`softmeet.Solution`.
        gated: whether a gate was closed.
    """

    token: int
    log_prob: float
    member_log_probs: list[float]
    top: list[tuple[int, float]]
    member_top: list[list[tuple[int, float]]]
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

    def spelled(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the report for people, as JSON has it: with the token's ``text``, and texts in place of listed ids."""

        def spell(token: int) -> str:
            return str(tokenizer.decode([token]))

        return asdict(self) | {
            "text": spell(self.token),
            "top": [[spell(j), x] for j, x in self.top],
            "member_top": [[[spell(j), x] for j, x in rows] for rows in self.member_top],
            "moved": [[spell(j), before, after] for j, before, after in self.moved],
        }


def token_report(solution: Solution, log_probs: Float[Tensor, "n B v"], row: int, token: int, top: int) -> TokenReport:
    """Report on one row of a solved batch, at the token that came.

    Args:
        solution: of the batch (B,).
        log_probs: the members', (n, B, v).
        row: which row.
        token: the token that came there.
        top: how many tokens to list.
    """
    ours = solution.log_probs[row]
    pool = ours if solution.gated[row] else solution.pool[row]
    change = (ours.exp() - pool.exp()).abs().topk(min(top, len(ours))).indices.tolist()
    return TokenReport(
        token=token,
        log_prob=ours[token].item(),
        member_log_probs=log_probs[:, row, token].tolist(),
        top=most_probable(ours, top),
        member_top=[[] if member[token].isnan() else most_probable(member, top) for member in log_probs[:, row]],
        moved=[(j, pool[j].item(), ours[j].item()) for j in change],
        pushes=_pushes(solution, row, change),
        disagreement=solution.disagreement[:, row].tolist(),
        disagreement_is_bound=solution.disagreement_is_bound[:, row].tolist(),
        status=Status(int(solution.status[row])).name,
        fallback=bool(solution.fallback[row]),
        gap=solution.gap[row].item(),
        gap_is_certified=bool(solution.gap_is_certified[row]),
        num_passes=solution.num_passes[row].item(),
        gated=bool(solution.gated[row]),
    )


def _pushes(solution: Solution, row: int, tokens: list[int]) -> list[list[float]]:
    """Compute what each member adds to each token's score, (tokens, members), in nats; 0 where no pool is tilted."""
    problem, dual = solution.problem, solution._answer.dual
    columns = [torch.zeros(len(tokens), dtype=torch.float64)] * len(dual)
    if problem.settings.rule.tilts_pool and tokens:
        where, rows = torch.tensor([tokens], device=problem.log_p.device), torch.tensor([row])
        views = problem.views(range(len(dual)))
        columns = [v.take(rows).rows(where)[0].double() @ lam[row] for v, lam in zip(views, dual, strict=True)]
    return torch.stack(columns, dim=-1).tolist()


def heat(disagreement: Sequence[float]) -> float:
    """Map members' disagreement in nats to a colour: 0 where they agree, 1 from half a nat in all.

    Example:
        >>> heat([0.1, 0.15]), heat([3.0, float("nan")])
        (0.5, 1.0)
    """
    return min(known_sum(disagreement) / _FULL, 1.0)


def known_sum(disagreement: Sequence[float]) -> float:
    """Sum over the members that were asked; the others have NaN.

    Example:
        >>> known_sum([0.25, float("nan")])
        0.25
    """
    return sum(x for x in disagreement if not math.isnan(x))


def shown(text: str) -> str:
    """Return a token's text with its spaces and line ends visible.

    Example:
        >>> shown(" a")
        '␣a'
    """
    return text.replace(" ", "␣").replace("\n", "⏎")


def most_probable(log_p: Float[Tensor, " v"], count: int) -> list[tuple[int, float]]:
    """List the most probable tokens, the first one first, each with its log-probability in nats.

    Example:
        >>> most_probable(torch.tensor([0.25, 0.5, 0.25]).log2(), 1)
        [(1, -1.0)]
    """
    best = log_p.topk(min(count, len(log_p)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


class TokenReports(Recorder):
    """A recorder that keeps every position to report on, for which it holds (n + 2) v numbers each.

    Pass it to ``generate`` as ``recorder=``; with beams also ask for ``return_dict_in_generate`` and ``output_scores``,
    which give the beam that each token came from.
    """

    def __init__(self, top: int = 5) -> None:
        super().__init__()
        self.top = top
        self._kept: list[tuple[Solution, Float[Tensor, "n B v"], int]] = []

    def add(self, solution: Solution, log_probs: Float[Tensor, "n B v"]) -> None:
        """Keep a solved batch."""
        super().add(solution, log_probs)
        self._kept += [(solution, log_probs, row) for row in range(solution.status.numel())]

    def of(
        self, generated: Sequence[Sequence[int]], rows: int, beam_indices: Int[Tensor, "s t"] | None = None
    ) -> list[list[TokenReport]]:
        """Report on generated sequences, token by token.

        Args:
            generated: the new tokens of each sequence, without prompt and padding.
            rows: of each forward pass: prompts times beams, or times returned sequences without beams.
            beam_indices: as ``generate`` returns them; None without beams.
        """
        found = []
        for s, tokens in enumerate(generated):
            sources = [s] * len(tokens) if beam_indices is None else beam_indices[s].tolist()
            found.append([self.at(t * rows + sources[t], token) for t, token in enumerate(tokens)])
        return found

    def at(self, index: int, token: int) -> TokenReport:
        """Report on the index-th row that was solved, at the token that came there."""
        return token_report(*self._kept[index], token, self.top)
