"""Instances for the rules over the feasible set, with what is known about each: feasible or not, degenerate or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from exact_oracles import constraints, is_feasible, stacked
from instances import INSTANCES, Instance, best_outputs, outputs, random_heads, zipf

from softmeet.heads import SoftmaxHead


@dataclass(frozen=True)
class Case:
    """Members, and whether all rows are feasible (None: some may be)."""

    build: Callable[[], Instance]
    feasible: bool | None
    constant: bool = True  # the linear and the quadratic program choose nothing
    boundary: bool = False  # C gives some tokens no probability


def premised(v, widths, seed, batch=2, bias=0.0) -> Instance:
    """The premise holds; with ``bias`` there are biases, which no combination of columns makes up for."""
    heads, truth = random_heads(v, widths, seed), zipf(batch, v, seed)
    if not bias:
        return best_outputs(heads, truth), heads
    generator = torch.Generator().manual_seed(seed)
    return biased_outputs(
        heads, [bias * torch.randn(v, generator=generator, dtype=torch.float64) for _ in heads], truth
    )


biased = functools.partial(premised, 48, (4, 5), 21, bias=1.0)


def biased_outputs(heads, biases, truth) -> Instance:
    """As ``best_outputs``, with heads that have biases."""
    return best_outputs(heads, truth, biases), [SoftmaxHead(W, beta) for W, beta in zip(heads, biases, strict=True)]


def boundary() -> Instance:
    """The moments of a truth on the first twenty tokens only, which are the extreme ones in one direction."""
    (W,) = random_heads(40, (3,), seed=11)
    W[:20, 0], W[20:, 0] = 1.0, torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5
    own = best_outputs([W[:20, 1:]], zipf(2, 20, seed=11))[0]
    sure = torch.cat([own, torch.full((2, 20), -45.0, dtype=torch.float64)], dim=-1).log_softmax(-1)
    even = torch.zeros_like(sure).log_softmax(-1)
    return torch.stack([sure, even]), [W, W[:, :1] * 0]


def faces() -> Instance:
    """Two members with full support, and truths on the first 25 of 80 tokens: all others lie beyond a hyperplane."""
    generator = torch.Generator().manual_seed(3)
    A = torch.cat(random_heads(80, (5, 5), seed=3), dim=-1)
    normal = torch.randn(10, generator=generator, dtype=torch.float64)
    normal /= normal.norm()
    beyond = (A @ normal).abs() + 0.1
    beyond[:25] = 0.0
    A = A - torch.outer(A @ normal + beyond, normal)
    heads = [A[:, :5], A[:, 5:]]
    truth = torch.zeros(2, 80, dtype=torch.float64)
    truth[:, :25] = (0.5 * torch.randn(2, 25, generator=generator, dtype=torch.float64)).softmax(-1)
    return best_outputs(heads, truth), heads


def large_infeasible() -> Instance:
    """At v = 1,024, D = 64, for hidden states drawn at random."""
    heads = random_heads(1024, (32, 32), seed=43)
    return outputs(heads, 1, seed=43, sharpness=3.0), heads


def trained() -> Instance:
    """The bundled narrow members, heads cut to 1,024 tokens, at hidden states of a text."""
    from softmeet import Ensemble

    ensemble = Ensemble.from_pretrained("narrow")
    hidden, _ = next(ensemble.positions("And the king said unto his daughter, Go", 2))
    heads = [SoftmaxHead(h.weight[:1024].detach().double()) for h in ensemble.model.heads]
    rows = [h.log_probs(x.double()) for h, x in zip(heads, hidden, strict=True)]
    return torch.stack(rows).detach(), heads


def of_text(*positions: int) -> Instance:
    """Two bundled narrow members at positions of a held-out text where C is not empty."""
    from softmeet import Ensemble
    from softmeet.evaluation.held_out import held_out_books

    ensemble = Ensemble.from_pretrained(["narrow/opt-a", "narrow/opt-b"])
    hidden, _ = next(ensemble.positions(held_out_books()[0].text, 160))
    heads = [SoftmaxHead(h.weight.detach().double()) for h in ensemble.model.heads]
    rows = [h.log_probs(x[list(positions)].double()) for h, x in zip(heads, hidden, strict=True)]
    return torch.stack(rows).detach(), heads


@functools.cache
def capped() -> Instance:
    """Logits under soft-caps, whose slopes make the programs discriminate; one member's leave C non-empty; heads."""
    generator = torch.Generator().manual_seed(61)
    heads = [SoftmaxHead(W, soft_cap=3.0) for W in random_heads(48, (3, 4), seed=61)]
    hidden = [torch.randn(2, head.d, generator=generator, dtype=torch.float64) * 0.4 for head in heads]
    return torch.stack([head.logits(h) for head, h in zip(heads, hidden, strict=True)]), heads


def soft_capped() -> Instance:
    logits, heads = capped()
    return logits.log_softmax(-1), heads


CASES: dict[str, Case] = {
    "generic": Case(INSTANCES["generic"], None),
    "premise": Case(INSTANCES["premise"], True),
    "peaked": Case(INSTANCES["peaked"], False),
    "rank_deficient": Case(INSTANCES["rank_deficient"], True),
    "duplicate_heads": Case(INSTANCES["duplicate_heads"], False),
    "constant_column": Case(INSTANCES["constant_column"], None),
    "near_one_hot": Case(INSTANCES["near_one_hot"], False),
    "boundary": Case(boundary, True, boundary=True),
    "faces": Case(faces, True, boundary=True),
    "nd > v, infeasible": Case(INSTANCES["wider_than_vocabulary"], False),
    "nd = v": Case(functools.partial(premised, 24, (12, 12), 31), True),
    "nd > v": Case(functools.partial(premised, 24, (14, 16), 32), True),
    "biased": Case(biased, True, constant=False),
    "soft-capped": Case(soft_capped, None, constant=False),
    "trained": Case(trained, False),
    "text": Case(lambda: of_text(27, 52), True),
    "v = 1024": Case(functools.partial(premised, 1024, (32, 32), 41, 1), True),
    "v = 1024, biased": Case(functools.partial(premised, 1024, (32, 32), 42, 1, 0.5), True, constant=False),
    "v = 1024, infeasible": Case(large_infeasible, False),
}


@functools.cache
def instance(name):
    """(log_probs, heads, options, per row (matrices, targets, G, g, feasible))."""
    log_p, heads = CASES[name].build()
    options = {"logits": capped()[0]} if name == "soft-capped" else {}
    rows = []
    for k in range(log_p.shape[1]):
        own = {**options, "logits": options["logits"][:, k]} if "logits" in options else options
        matrices, targets = constraints(log_p[:, k], heads, own)
        G, g = stacked(matrices, targets)
        rows.append((matrices, targets, G, g, is_feasible(G, g)))
    return log_p, heads, options, rows
