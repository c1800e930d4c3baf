"""Named instances for the solvers: (log_probs (n, B, v), heads), feasible, infeasible and hostile."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Instance = tuple[Tensor, list[Tensor]]


def random_heads(v: int, widths: tuple[int, ...], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(v, d, generator=generator, dtype=torch.float64) * scale for d in widths]


def outputs(heads: list[Tensor], batch: int, seed: int, sharpness: float = 1.5) -> Tensor:
    """Log-probabilities of hidden states drawn at random: in general no p has all their moments."""
    generator = torch.Generator().manual_seed(seed + 1000)
    rows = [
        (torch.randn(batch, W.shape[1], generator=generator, dtype=torch.float64) * sharpness / W.shape[1] ** 0.5 @ W.T)
        for W in heads
    ]
    return torch.stack(rows).log_softmax(-1)


def best_outputs(heads: list[Tensor], truth: Tensor, biases: list[Tensor] | None = None) -> Tensor:
    """The members' best log-probabilities for a true distribution (B, v): the premise holds, and truth is feasible."""
    rows = []
    for W, beta in zip(heads, biases or [torch.zeros(())] * len(heads), strict=True):
        h = torch.zeros(len(truth), W.shape[1], dtype=torch.float64)
        for _ in range(60):
            p = (h @ W.T + beta).softmax(-1)
            g = (p - truth) @ W
            mean = p @ W
            H = torch.einsum("bv,vi,vj->bij", p, W, W) - mean[:, :, None] * mean[:, None, :]
            H += 1e-12 * torch.eye(W.shape[1], dtype=torch.float64)
            step = torch.linalg.solve(H, g[..., None]).squeeze(-1)
            # Halve until the cross-entropy falls.
            t = torch.ones(len(truth), 1, dtype=torch.float64)
            now = -(truth * (h @ W.T + beta).log_softmax(-1)).sum(-1)
            for _ in range(40):
                then = -(truth * ((h - t * step) @ W.T + beta).log_softmax(-1)).sum(-1)
                if not (then > now + 1e-15).any():
                    break
                t = torch.where((then > now + 1e-15)[:, None], t / 2, t)
            h = h - t * step
            if step.abs().max() < 1e-13:
                break
        rows.append((h @ W.T + beta).log_softmax(-1))
    return torch.stack(rows)


def zipf(batch: int, v: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 2000)
    ranks = torch.stack([torch.randperm(v, generator=generator) for _ in range(batch)]).double() + 1
    return ranks.reciprocal() / ranks.reciprocal().sum(-1, keepdim=True)


def generic() -> Instance:
    heads = random_heads(48, (4, 6), seed=1)
    return outputs(heads, 5, seed=1), heads


def premise() -> Instance:
    heads = random_heads(64, (6, 5, 4), seed=2)
    return best_outputs(heads, zipf(4, 64, seed=2)), heads


def sharp() -> Instance:
    """As peaked as an interior-point method on the exponential cone can follow."""
    heads = random_heads(48, (5, 5), seed=9)
    return outputs(heads, 3, seed=9, sharpness=2.5), heads


def peaked() -> Instance:
    heads = random_heads(48, (5, 5), seed=3)
    return outputs(heads, 4, seed=3, sharpness=8.0), heads


def rank_deficient() -> Instance:
    heads = random_heads(48, (4, 6), seed=4)
    heads[1][:, 3] = 2 * heads[1][:, 0] - heads[1][:, 1] + 5
    return outputs(heads, 3, seed=4), heads


def duplicate_heads() -> Instance:
    (head,) = random_heads(48, (5,), seed=5)
    return outputs([head, head], 3, seed=5), [head, head.clone()]


def constant_column() -> Instance:
    heads = random_heads(48, (4, 3), seed=6)
    heads[0][:, 1] = 7.0
    return outputs(heads, 3, seed=6), heads


def wider_than_vocabulary() -> Instance:
    heads = random_heads(24, (14, 15), seed=7)
    return outputs(heads, 3, seed=7), heads


def near_one_hot() -> Instance:
    heads = random_heads(48, (4, 6), seed=8)
    return outputs(heads, 4, seed=8, sharpness=60.0), heads


def once(build: Callable[[], Instance]) -> Callable[[], Instance]:
    """Builds an instance once and gives copies, which may be changed."""
    built = functools.cache(build)

    def copies() -> Instance:
        log_p, heads = built()
        return log_p.clone(), [head.clone() for head in heads]

    return copies


INSTANCES: dict[str, Callable[[], Instance]] = {
    f.__name__: once(f)
    for f in (generic, premise, sharp, peaked, rank_deficient, duplicate_heads, constant_column, wider_than_vocabulary,
              near_one_hot)
}  # fmt: skip
