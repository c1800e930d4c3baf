"""What happened in a text over bytes: between places where every member's tokenizer cuts it, who expected what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from softmeet.hf.report import most_probable
from softmeet.members.covers import END

if TYPE_CHECKING:
    from softmeet.hf.byte_modeling import ByteEnsembleForCausalLM

Listed = list[tuple[str, float]]


@dataclass(frozen=True)
class GroupReport:
    """A stretch of characters that every member reads as whole tokens; log-probabilities and disagreement are in nats.

    Attributes:
        text: the characters.
        log_prob, member_log_probs: of all their bytes, by the ensemble and by each member.
        top: (byte, log-probability) of what the ensemble expected as the first byte, the most probable first.
        member_top: (token, log-probability) of what each member expected there, in its own tokens.
        disagreement: each member's, summed over the bytes.
    """

    text: str
    log_prob: float
    member_log_probs: list[float]
    top: Listed
    member_top: list[Listed]
    disagreement: list[float]

    def spelled(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the report as :meth:`TokenReport.spelled` does: an average moves nothing, and is exact."""
        return asdict(self) | {
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


def group_reports(model: ByteEnsembleForCausalLM, text: bytes, top: int) -> list[GroupReport]:
    """Report on a text between the places where every member's tokenizer cuts it.

    Args:
        model: the ensemble.
        text: in UTF-8.
        top: bytes and tokens to list of each distribution.
    """
    log_probs = torch.stack([torch.from_numpy(reader.score(text)[1][: len(text)]) for reader in model.readers])
    expected = [reader.expected(text, top) for reader in model.readers]
    solutions = [solution for _, solution in model.combiner.solve_in_chunks(list(log_probs), model.settings)]
    answer = torch.cat([solution.log_probs for solution in solutions])
    apart = torch.cat([solution.disagreement for solution in solutions], -1)
    # Where a member does not see the first byte, the first stretch begins there all the same.
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
            )
        )
    return found


def shown_byte(symbol: int) -> str:
    r"""Return a byte as its ASCII character, else as ``\xNN``; the end as ``<|end|>``.

    Example:
        >>> shown_byte(65), shown_byte(200), shown_byte(256)
        ('A', '\\xC8', '<|end|>')
    """
    if symbol == END:
        return "<|end|>"
    return chr(symbol) if symbol < 0x80 else f"\\x{symbol:02X}"
