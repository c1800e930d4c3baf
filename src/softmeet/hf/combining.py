"""From hidden states to the rule's distribution: what an ensemble does once its members have run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmeet.errors import InvalidInputError, NonFiniteError, UnsupportedHeadError
from softmeet.heads import SoftmaxHead
from softmeet.hf.recorder import Recorder
from softmeet.members.bands import bands
from softmeet.rules.combine import product_dtype, solve
from softmeet.rules.gates import Unsure
from softmeet.rules.problem import Problem, TokensBefore
from softmeet.rules.settings import Settings
from softmeet.rules.solution import Solution
from softmeet.rules.validate import free_directions, normalised, slopes_of

# Hidden states of every member at B positions; and logits or log-probabilities of every member there.
Hidden = Sequence[Float[Tensor, "B _"]]
Scores = Float[Tensor, "n B v"]
# Elements of fp64 vectors over the vocabulary that one call of combine may hold: 512 MiB.
_ELEMENTS = 1 << 26


def rows_at_once(v: int, n: int) -> int:
    """Return at how many positions n members' distributions over v tokens are combined in one solve."""
    return max(1, _ELEMENTS // (v * 4 * n))


@dataclass
class Deferral:
    """The positions at which the first member of a cascade deferred to the others, so that all of them ran.

    Attributes:
        rows: (B,), True where all members ran, and False where the first one answers alone.
        logits: (B, v), the first member's at all B positions, where they are known already.
        seconds: that the other members took.
    """

    rows: Bool[Tensor, " B"]
    logits: Float[Tensor, "B v"] | None = None
    seconds: float = 0.0

    def take(self, rows: slice) -> Deferral:
        """Return the same for some of the positions."""
        return Deferral(self.rows[rows], None if self.logits is None else self.logits[rows])

    @staticmethod
    def of(head: SoftmaxHead, gate: Unsure, hidden: Float[Tensor, "B d"]) -> Deferral:
        """Decide by a gate at which positions a first member defers to the others.

        Args:
            head: the first member's.
            gate: open where that member is unsure.
            hidden: (B, d), that member's last hidden states.
        """
        chunk = rows_at_once(head.v, 1)
        if len(hidden) <= chunk:
            logits = head.logits(hidden)
            return Deferral(gate.among(logits.log_softmax(-1)), logits)
        # Too many to keep: they are made again, some at a time, when they are combined.
        return Deferral(torch.cat([gate.among(head.log_probs(part)) for part in hidden.split(chunk)]))


class Combiner:
    """The heads of an ensemble, by which a rule is applied to hidden states that the members have computed.

    Attributes:
        names: of the members, for messages.
        heads: their output layers, in order.
        v: the rows of the largest head.
        support: (v,), which ids are tokens where heads are padded; None if all are.
        capped: whether a head has a soft-cap, so that rules need the logits themselves.
    """

    def __init__(
        self, names: Sequence[str], heads: Sequence[SoftmaxHead], support: Bool[Tensor, " v"] | None = None
    ) -> None:
        self.names, self.heads, self.support = names, list(heads), support
        self.v = max(head.v for head in heads)
        self.capped = any(head.soft_cap is not None for head in heads)
        self._banded: tuple[int, list[SoftmaxHead]] | None = None

    def combine(
        self,
        hidden: Sequence[Float[Tensor, "B k _"]],
        settings: Settings,
        deferral: Deferral | None = None,
        recorder: Recorder | None = None,
        before: TokensBefore | None = None,
    ) -> Float[Tensor, "B k v"]:
        """Return the rule's log-probabilities in nats at k positions of B rows, and tell the recorder how they came.

        Args:
            hidden: (B, k, d_i) for member i.
            settings, deferral, before: as of :meth:`solve_rows`.
            recorder: receives every solution; None for nobody.
        """
        parts = []
        if recorder is not None and deferral is not None:
            recorder.gate.seconds += deferral.seconds
        flat = [h.flatten(0, 1) for h in hidden]
        for log_probs, solution in self.solve_in_chunks(flat, settings, deferral, before, proved=False):
            if recorder is not None:
                recorder.add(solution, log_probs)
            parts.append(solution.log_probs)
        return torch.cat(parts).reshape(*hidden[0].shape[:2], -1)

    def solve_in_chunks(
        self,
        hidden: Hidden,
        settings: Settings,
        deferral: Deferral | None = None,
        before: TokensBefore | None = None,
        *,
        proved: bool = True,
    ) -> Iterator[tuple[Float[Tensor, "n b v"], Solution]]:
        """Solve positions in their order, as :meth:`solve_rows` does, some at a time so that memory stays bounded."""
        chunk = rows_at_once(self.v, len(hidden))
        for start in range(0, len(hidden[0]), chunk):
            rows = slice(start, start + chunk)
            some = None if deferral is None else deferral.take(rows)
            known = None if before is None else before.take(rows)
            yield self.solve_rows([h[rows] for h in hidden], settings, some, known, proved=proved)

    def solve_rows(
        self,
        hidden: Hidden,
        settings: Settings,
        deferral: Deferral | None = None,
        before: TokensBefore | None = None,
        *,
        proved: bool = True,
    ) -> tuple[Scores, Solution]:
        """Combine the members at B positions, from their hidden states.

        Args:
            hidden: (B, d_i) for member i.
            settings: how to combine.
            deferral: the positions at which all members ran; elsewhere the first one answers alone, what stands in
                place of the others' hidden states is not read, and what they would say is NaN. None if all members ran
                at all positions.
            before: the token before each position, for gates that look at the text.
            proved: end rows on bounds; else an estimate of what is left to gain will do, as in generation.

        Returns:
            (the members' log-probabilities in nats, the rule's solution).
        """
        logits = self.own_logits(hidden, deferral)
        if deferral is not None:
            settings = settings.model_copy(update={"gate": Unsure(1.0, deferral.rows.to(logits.device))})
        states = [h.to(logits.device) for h in hidden] if settings.free_radial else None
        solution = self.combine_rows(logits, logits, settings, hidden=states, proved=proved, before=before)
        log_probs = solution.problem.log_p[:: settings.bands]
        return (log_probs, solution) if deferral is None else _nan_where_not_run(log_probs, solution)

    def own_logits(self, hidden: Hidden, deferral: Deferral | None = None) -> Scores:
        """Compute the members' logits, in fp32 or fp64, from their hidden states; -inf past a head's last row.

        At positions without ``deferral`` to them, all members but the first are given equal logits.
        """
        place, v = self.heads[0].weight.device, self.v
        found = []
        for i, (head, states) in enumerate(zip(self.heads, hidden, strict=True)):
            states = states.to(head.weight.device)
            own = head.logits(states) if deferral is None else _where_run(head, states, deferral, first=not i)
            own = own.to(place)
            found.append(nn.functional.pad(own, (0, v - head.v), value=-torch.inf) if head.v < v else own)
        return torch.stack(found)

    def own_log_probs(self, hidden: Hidden) -> tuple[Scores, Scores | None]:
        """Compute (the members' log-probabilities in nats, their logits if a head has a soft-cap, else None)."""
        logits = self.own_logits(hidden)
        return logits.log_softmax(-1), logits if self.capped else None

    def combine_rows(
        self,
        scores: Scores,
        logits: Scores | None,
        settings: Settings,
        *,
        hidden: Hidden | None = None,
        start: Solution | None = None,
        relaxed: Solution | None = None,
        proved: bool = True,
        before: TokensBefore | None = None,
    ) -> Solution:
        """Combine the members at B positions, from their logits or log-probabilities.

        Where the gate ``unsure`` is closed, the first member answers without the rule's temperature too.

        Args:
            scores: log-probabilities up to a constant, which is all that counts of logits without a soft-cap.
            logits: where a head has a soft-cap.
            settings: how to combine.
            hidden: each member's hidden states, for ``free_radial``.
            start, relaxed: as ``start`` and ``on_infeasible`` of :func:`softmeet.combine`.
            proved, before: as of :meth:`solve_rows`.

        Raises:
            NonFiniteError: NaN or +inf from a member, which the message names.
        """
        heads, dtype = self.heads, scores.dtype
        try:
            log_p = normalised(scores)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. Members, from 0: {', '.join(self.names)}") from error
        if settings.free_radial:
            self._refuse_unknown_norms(settings)
        capped = None if logits is None or not self.capped else logits
        bands = settings.bands
        if bands > 1:
            heads, settings = self.banded_heads(bands), settings.for_bands()
            log_p = log_p.repeat_interleave(bands, 0)
            capped = None if capped is None else capped.repeat_interleave(bands, 0)
        problem = Problem(
            log_p=log_p,
            heads=tuple(heads),
            slopes=(None,) * len(heads) if capped is None else slopes_of(heads, capped, log_p, log_p.shape),
            settings=settings,
            support=self.support,
            dtype=product_dtype(dtype, settings.tol),
            free=free_directions(heads, log_p, capped, hidden, log_p.shape) if settings.free_radial else (),
            start=None if start is None else start.as_start(heads, log_p),
            precision=torch.finfo(dtype).eps,
            proved=proved,
            before=before,
        )
        known = None if relaxed is None else relaxed.as_fallback(problem)
        solution = solve(problem, log_p.shape[1:2], dtype, known)
        return solution if bands == 1 else solution.by_member(bands)

    def _refuse_unknown_norms(self, settings: Settings) -> None:
        if settings.bands > 1:
            raise InvalidInputError(
                f"free_radial needs whole heads, got {settings.bands} bands of each: leave out one of both"
            )
        names = zip(self.names, self.heads, strict=True)
        if unknown := [name for name, head in names if head.norm is None]:
            raise UnsupportedHeadError(
                f"free_radial needs a final norm of a known kind right before the output layer, and found none in "
                f"{', '.join(unknown)}: leave it out"
            )

    def banded_heads(self, count: int) -> list[SoftmaxHead]:
        """Cut each head in turn into so many bands of principal directions; done once, and as large as the heads."""
        if count == 1:
            return self.heads
        if self._banded is None or self._banded[0] != count:
            self._banded = count, [band for head in self.heads for band in bands(head, count)]
        return self._banded[1]


def _where_run(
    head: SoftmaxHead, states: Float[Tensor, "B d"], deferral: Deferral, *, first: bool
) -> Float[Tensor, "B v"]:
    """Compute a member's logits, in fp32 or fp64; equal ones, and no product with the head, where it did not run."""
    if first and deferral.logits is not None:
        return deferral.logits
    if first or bool(deferral.rows.all()):
        return head.logits(states)
    out = states.new_zeros(len(states), head.v, dtype=torch.promote_types(states.dtype, torch.float32))
    rows = deferral.rows.nonzero().squeeze(-1).to(states.device)
    return out.index_copy(0, rows, head.logits(states[rows]).to(out.device)) if len(rows) else out


def _nan_where_not_run(log_probs: Scores, solution: Solution) -> tuple[Scores, Solution]:
    """Put NaN in place of what a member that did not run would say."""
    log_probs, disagreement = log_probs.clone(), solution.disagreement.clone()
    log_probs[1:, solution.gated] = torch.nan
    disagreement[1:, solution.gated] = torch.nan
    return log_probs, replace(solution, disagreement=disagreement)
