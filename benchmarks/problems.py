"""Instances that the benchmarks share: rows to combine, at the sizes and with the shapes of real models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from softmeet import Ensemble, SoftmaxHead
from softmeet.evaluation.held_out import held_out_books


@dataclass(frozen=True)
class Rows:
    """B rows to combine: the members' log-probabilities, (n, B, v) in nats, and their heads."""

    log_probs: Float[Tensor, "n B v"]
    heads: list[SoftmaxHead]

    def take(self, start: int, stop: int) -> Rows:
        """Some rows."""
        return Rows(self.log_probs[:, start:stop], self.heads)


def correlated(v: int, widths: tuple[int, ...], batch: int, seed: int = 0) -> Rows:
    """Members that learnt the same language with heads of their own, shaped after a pretrained pair.

    Principal cosines between heads fall evenly from 1 to 0; the spectra of heads and of hidden states decay as powers;
    token frequencies follow Zipf's law; all members see one context, with 2 % of the variance of the hidden state their
    own; distributions have 2 to 6 nats of entropy, the same for all members of a row.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    common, context = normal(v, max(widths)), normal(batch, max(widths))
    frequency = -torch.arange(1, v + 1).float().log()
    entropies = 2 + 4 * torch.rand(batch, generator=generator)
    heads, log_probs = [], []
    for d in widths:
        rank = torch.arange(1, d + 1).float()
        cosine = 1 - (rank - 1) / d
        weight = common[:, :d] * cosine + normal(v, d) * (1 - cosine**2).sqrt()
        weight[:, 0] = frequency
        weight *= rank.pow(-0.15)
        hidden = (0.99 * context[:, :d] + 0.14 * normal(batch, d)) * rank.pow(-0.75)
        hidden[:, 0] = 0.5
        log_probs.append(_sharpened(hidden @ weight.T, entropies))
        heads.append(SoftmaxHead(weight @ torch.linalg.qr(normal(d, d)).Q))
    return Rows(torch.stack(log_probs), heads)


def _sharpened(logits: Float[Tensor, "B v"], entropies: Float[Tensor, " B"]) -> Float[Tensor, "B v"]:
    """Log softmax of multiples of ``logits`` that have these entropies, in nats."""
    low, high = torch.full_like(entropies, -6.0), torch.full_like(entropies, 4.0)
    for _ in range(30):
        middle = (low + high) / 2
        log_p = (logits * middle.exp()[:, None]).log_softmax(-1)
        too_flat = -(log_p.exp() * log_p).sum(-1) > entropies
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return (logits * low.exp()[:, None]).log_softmax(-1)


@torch.inference_mode()
def held_out(members: str | list[str], positions: int, *, books: int = 4) -> Rows:
    """The bundled members, or others, at the first positions of books that no bundled member has seen."""
    ensemble = Ensemble.from_pretrained(members)
    works = held_out_books()
    works = works[:: len(works) // books][:books]
    parts: list[list[Tensor]] = []
    for work in works:
        limit = positions // len(works)
        windows = [states for states, _ in ensemble.positions("<|endoftext|>" + work.text, limit)]
        parts.append([torch.cat(own) for own in zip(*windows, strict=True)])
    hidden = [torch.cat(own) for own in zip(*parts, strict=True)]
    heads = ensemble.model.heads
    return Rows(torch.stack([head.log_probs(h) for head, h in zip(heads, hidden, strict=True)]), heads)


@torch.inference_mode()
def of_text(members: list[str], text: str, count: int) -> Rows:
    """Any members at ``count`` positions spread evenly over the first windows of a text."""
    ensemble = Ensemble.from_pretrained(members)
    windows = [states for states, _ in ensemble.positions(text, max(count, 512))]
    hidden = [torch.cat(own) for own in zip(*windows, strict=True)]
    some = torch.linspace(0, len(hidden[0]) - 1, count).long()
    heads = ensemble.model.heads
    return Rows(torch.stack([head.log_probs(h[some]) for head, h in zip(heads, hidden, strict=True)]), heads)


def premise(v: int, widths: tuple[int, ...], batch: int, seed: int = 0) -> tuple[Rows, Float[Tensor, "B v"]]:
    """(rows for which the premise holds, the truth): each member's hidden state is its best one for a known truth."""
    given = correlated(v, widths, batch, seed)
    truth = given.log_probs.double().logsumexp(0) - math.log(len(widths))
    return Rows(torch.stack([_best(head, truth) for head in given.heads]), given.heads), truth


def _best(head: SoftmaxHead, truth: Float[Tensor, "B v"]) -> Float[Tensor, "B v"]:
    """Log-probabilities of the family's member with the moments of ``truth``, by Newton's method."""
    W = head.weight.double()
    W = W - W.mean(0)
    rows = []
    for p in truth.exp():
        h = torch.zeros(W.shape[1], dtype=W.dtype)
        for _ in range(50):
            now = (W @ h).softmax(-1)
            gradient = W.T @ (now - p)
            A = W - now @ W
            step = torch.linalg.solve((A * now[:, None]).T @ A + 1e-9 * torch.eye(len(h), dtype=W.dtype), gradient)
            t, loss = 1.0, -(p @ (W @ h).log_softmax(-1))
            while -(p @ (W @ (h - t * step)).log_softmax(-1)) > loss and t > 1e-6:
                t /= 2
            h = h - t * step
            if gradient @ step < 1e-16:
                break
        rows.append((W @ h).log_softmax(-1))
    return torch.stack(rows)
