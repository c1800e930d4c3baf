"""`meet` itself, at the size of real models and on real text.

Instances are synthetic, shaped after a pretrained pair, or they are the bundled families on books that they have not
seen, or real members (-m A -m B) on a text.
"""

from __future__ import annotations

import resource
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from jaxtyping import Float
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

import softmeet
from report import JsonPath, Members, Repeats, Threads, commands, median, named, now, quantile, seconds, show
from softmeet import Ensemble, SoftmaxHead, Status
from softmeet.evaluation.held_out import held_out_books
from softmeet.evaluation.premise import own_text
from softmeet.rules.meet import Meet
from softmeet.simplex import total_variation
from softmeet.solvers import tuning as constants

app = commands(__doc__)
FAMILIES = ("narrow", "wide")
SIZES = {
    "tiny": (2_048, (32, 32)),
    "small": (16_384, (256, 256)),
    "gpt2": (50_257, (768, 768)),
    "large": (128_256, (2048, 2048)),
}
Trust = Annotated[float, typer.Option(help="Of every member.")]
Tol = Annotated[float, typer.Option(help="Nats.")]
TextFile = Annotated[Path | None, typer.Option("--text", help="A text for real members.")]
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """B rows to combine: the members' log-probabilities, (n, B, v) in nats, and their heads."""

    log_probs: Float[Tensor, "n B v"]
    heads: list[SoftmaxHead]

    def take(self, start: int, stop: int) -> Rows:
        """Return some rows."""
        return Rows(self.log_probs[:, start:stop], self.heads)

    def solve(self, rule: Any = "meet", **options: Any) -> softmeet.Solution:
        """Combine them."""
        return softmeet.combine(self.log_probs, self.heads, rule, **options)


def correlated(v: int, widths: tuple[int, ...], batch: int, seed: int = 0) -> Rows:
    """Return members that learnt the same language with heads of their own, shaped after a pretrained pair.

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
    """Return log softmax of multiples of ``logits`` that have these entropies, in nats."""
    low, high = torch.full_like(entropies, -6.0), torch.full_like(entropies, 4.0)
    for _ in range(30):
        middle = (low + high) / 2
        log_p = (logits * middle.exp()[:, None]).log_softmax(-1)
        too_flat = -(log_p.exp() * log_p).sum(-1) > entropies
        low, high = torch.where(too_flat, middle, low), torch.where(too_flat, high, middle)
    return (logits * low.exp()[:, None]).log_softmax(-1)


def _at(heads: list[SoftmaxHead], hidden: list[Tensor]) -> Rows:
    return Rows(torch.stack([head.log_probs(h) for head, h in zip(heads, hidden, strict=True)]), heads)


@torch.inference_mode()
def held_out(family: str, positions: int, *, books: int = 4) -> Rows:
    """Return a bundled family at the first positions of books that it has not seen."""
    ensemble, works = Ensemble.from_pretrained(family), held_out_books()
    works = works[:: len(works) // books][:books]
    texts = [ensemble.positions("<|endoftext|>" + work.text, positions // len(works)) for work in works]
    parts = [states for windows in texts for states, _ in windows]
    return _at(ensemble.model.heads, [torch.cat(own) for own in zip(*parts, strict=True)])


@torch.inference_mode()
def of_members(members: list[str], text: Path | None, count: int) -> Rows:
    """Return members at positions spread over the first windows of a text, or of one that they sample together."""
    ensemble = Ensemble.from_pretrained(members)
    if text is None:
        return _at(ensemble.model.heads, own_text(ensemble.model, count))
    windows = [states for states, _ in ensemble.positions(text.read_text(encoding="utf-8"), max(count, 512))]
    hidden = [torch.cat(own) for own in zip(*windows, strict=True)]
    some = torch.linspace(0, len(hidden[0]) - 1, count).long()
    return _at(ensemble.model.heads, [own[some] for own in hidden])


class _Reached(Exception):  # noqa: N818 - not an error
    pass


def _line(what: str, taken: list[float], passes: float | None, note: str) -> Row:
    one, worst = (median(taken), max(taken)) if taken else (None, None)
    return {"what": what, "s a row": one, "slowest": worst, "passes": passes, "note": note}


def _lbfgs(rows: Rows, row: int, trust: float, goal: float) -> tuple[float, int, str]:
    """Run SciPy's L-BFGS-B on the same whitened dual, fp32 products, until the dual value is at most ``goal``.

    Returns:
        (seconds, reads of the heads, what came out).
    """
    from scipy.optimize import minimize

    heads = rows.heads
    factors = [(h.whitening().center.float(), h.whitening().factor.float()) for h in heads]
    log_p = rows.log_probs[:, row].double()
    log_q = log_p.mean(0).log_softmax(-1)
    widths, reads = [R.shape[1] for _, R in factors], 0

    def scores(nu: Tensor) -> list[Tensor]:
        parts = nu.float().split(widths)
        return [
            (h.weight.detach() @ (R @ x)).double() - float(c @ (R @ x))
            for h, (c, R), x in zip(heads, factors, parts, strict=True)
        ]

    def dual(at: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal reads
        reads += 2
        z = scores(torch.from_numpy(at))
        p_logs = log_q + sum(z)
        value, p, gradient = p_logs.logsumexp(-1), p_logs.softmax(-1), []
        for own, x, h, (c, R) in zip(log_p, z, heads, factors, strict=True):
            logs = own - x / trust
            value = value + trust * logs.logsumexp(-1)
            difference = (p - logs.softmax(-1)).float()
            gradient.append(R.T @ (difference @ h.weight.detach() - difference.sum() * c))
        if value.item() <= goal:
            raise _Reached
        return value.item(), torch.cat(gradient).double().numpy()

    start = now()
    try:
        found = minimize(dual, np.zeros(sum(widths)), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 0})
    except _Reached:
        return now() - start, reads, "same gap"
    return now() - start, reads, f"stopped {float(found.fun - goal):.1e} nats above"


def _clarabel(rows: Rows, row: int, trust: float, limit: float) -> Row:
    """Solve the same relaxation on the exponential cone."""
    import cvxpy as cp

    log_p, what = rows.log_probs[:, row].double(), "CVXPY with Clarabel, once"
    q = log_p.mean(0).softmax(-1).numpy()
    p = cp.Variable(len(q), nonneg=True)
    objective, constraints = cp.sum(cp.kl_div(p, q)), [cp.sum(p) == 1]
    for own, head in zip(log_p, rows.heads, strict=True):
        W = head.weight.double() - head.weight.double().mean(0)
        W = (W / torch.linalg.matrix_norm(W, 2)).numpy()
        r = cp.Variable(len(q), nonneg=True)
        objective += trust * cp.sum(cp.kl_div(r, own.exp().numpy()))
        constraints += [cp.sum(r) == 1, W.T @ p == W.T @ r]
    problem, start = cp.Problem(cp.Minimize(objective), constraints), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            problem.solve(solver=cp.CLARABEL, time_limit=limit)
        except cp.SolverError:
            return _line(what, [], None, f"over {limit:g} s or failed")
    taken = time.perf_counter() - start
    if problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        return _line(what, [taken], None, f"objective {problem.value:.6f}")
    return _line(what, [], None, problem.status)


def _alone(rows: Rows, trust: float, tol: float) -> Row:
    """Solve each row by itself on one core."""
    torch.set_num_threads(1)
    taken, passes, gaps = [], [], []
    rows.take(0, 1).solve(trust=trust, tol=tol)
    for k in range(rows.log_probs.shape[1]):
        start = now()
        found = rows.take(k, k + 1).solve(trust=trust, tol=tol)
        taken.append(now() - start)
        passes.append(found.num_passes.item())
        gaps.append(found.gap.item())
    return _line("meet, one row, one core", taken, median(passes), f"gap at most {max(gaps):.1e}")


def _together(rows: Rows, trust: float, tol: float, threads: int) -> list[Row]:
    """Solve rows as a batch, and average them."""
    torch.set_num_threads(threads)
    size = rows.log_probs.shape[1]
    found = rows.solve(trust=trust, tol=tol)
    taken = [s / size for s in seconds(partial(rows.solve, trust=trust, tol=tol), repeats=3, warm_up=0)]
    mean = [s / size for s in seconds(partial(rows.solve, "logit-mean"))]
    what = f"meet, batch of {size}, {'one thread' if threads == 1 else f'{threads} threads'}"
    note = f"{int((found.status == 0).sum())} of {size} solved"
    return [
        _line(what, taken, found.num_passes.median().item(), note),
        _line(f"logit-mean, batch of {size}", mean, 0.0, "the naive average"),
    ]


@app.command("row")
def one_row(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "small",
    rows: Annotated[int, typer.Option(help="Rows to solve alone.")] = 8,
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 32,
    trust: Trust = 1.0,
    tol: Tol = 1e-5,
    threads: Annotated[int, typer.Option(help="Of the batch.")] = 1,
    limit: Annotated[float, typer.Option(help="Seconds for Clarabel; 0 to leave it out.")] = 60.0,
    member: Members = None,
    text: TextFile = None,
    json: JsonPath = None,
) -> None:
    """Time one row at the size of real models, alone on one core and in a batch, beside other solvers.

    L-BFGS runs on the same dual to the same gap, Clarabel once, under a time limit.
    """
    if member and text is None:
        raise typer.BadParameter("real members need a text: --text FILE")
    torch.set_num_threads(threads)
    given = of_members(member, text, max(rows, batch)) if member else correlated(*SIZES[size], max(rows, batch))
    start = now()
    for head in given.heads:
        head.whitening()
    once, peak = now() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    some = given.take(0, rows)
    table = [_alone(some, trust, tol), *_together(given.take(0, batch), trust, tol, threads)]
    torch.set_num_threads(1)
    goals = (tol - some.take(0, 3).solve(trust=trust, tol=tol / 10).objective).tolist()
    times, reads, notes = zip(*(_lbfgs(some, k, trust, goal) for k, goal in enumerate(goals)), strict=True)
    table.append(_line("L-BFGS (scipy), one core", [*times], median(reads), notes[0]))
    if limit:
        torch.set_num_threads(threads)
        table.append(_clarabel(given, 0, trust, limit))
    for row in table:
        row["over ours"] = None if row["s a row"] is None else row["s a row"] / table[0]["s a row"]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 2**20
    v, widths = given.log_probs.shape[-1], tuple(head.d for head in given.heads)
    title = f"v = {v:,}, widths {widths}, trust {trust:g}, tol {tol:g}; whitening, once: {once:.1f} s"
    show(f"{title}; {grown:.2f} GiB more", table, json, trust=trust, tol=tol, whitening_seconds=once)


@app.command()
def passes(
    positions: Annotated[int, typer.Option(help="Of each family.")] = 1024,
    trust: Annotated[str, typer.Option(help="Trusts, the same for every member.")] = "0.3,1,2",
    tol: Tol = 1e-5,
    threads: Threads = 1,
    json: JsonPath = None,
) -> None:
    """Count how often `meet` reads the heads on held-out text, and how near it comes to the full Hessian in fp64."""
    rows, chunk = list[Row](), 64
    for family in FAMILIES:
        given = held_out(family, positions)
        size = given.log_probs.shape[1]
        for rho in (float(x) for x in trust.split(",")):
            reads, gaps, distances, certified, taken = [], [], [], 0, 0.0
            given.take(0, chunk).solve(trust=rho, tol=tol)  # what is found once a head is found
            for start in track(range(0, size, chunk), description=f"{family}, trust {rho:g}", transient=True):
                part, begun = given.take(start, start + chunk), now()
                ours = part.solve(trust=rho, tol=tol)
                taken += now() - begun
                exact = Rows(part.log_probs.double(), part.heads).solve(trust=rho, tol=1e-10, max_steps=100)
                reads += ours.num_passes.tolist()
                gaps += ours.gap.tolist()
                certified += int((ours.gap_is_certified & (ours.status == Status.OPTIMAL)).sum())
                distances += total_variation(ours.log_probs.double(), exact.log_probs).tolist()
            rows.append({
                "family": family, "trust": rho, "positions": size, "passes, median": quantile(reads, 0.5),
                "99 %": quantile(reads, 0.99), "largest": max(reads), "certified": f"{certified} of {size}",
                "largest gap": max(gaps), "largest TV": max(distances), "ms a row": 1e3 * taken / size,
            })  # fmt: skip
    show(f"meet at tol {tol:g} on held-out text", rows, json, tol=tol)


@app.command()
def budget(
    positions: Annotated[int, typer.Option(help="Of each family or text.")] = 64,
    trust: Annotated[str, typer.Option(help="Trusts, the same for every member.")] = "0.3,1",
    steps: Annotated[str, typer.Option("--budget", help="Steps.")] = "1,2,3,5",
    member: Members = None,
    text: TextFile = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="Or on text that they sample themselves.")] = False,
    threads: Threads = 1,
    repeats: Repeats = 3,
    json: JsonPath = None,
) -> None:
    """Measure what `meet` gives after a few steps, without bounds, as by `meet:budget=K`.

    Told is the total variation to the answer at a tolerance of 1e-6 nats, beside the pool's own and that of `meet` at
    the default tolerance. A row costs what it does in a batch of all.
    """
    if member and not sampled and text is None:
        raise typer.BadParameter("members need a text: --text FILE, or --sampled")
    if member:
        given = {" + ".join(map(named, member)): of_members(member, text, positions)}
    else:
        given = {family: held_out(family, positions) for family in FAMILIES}
    rules: dict[str, Any] = {"the pool": "logit-mean"}
    rules |= {f"meet:budget={k}": Meet(budget=int(k)) for k in steps.split(",")} | {"meet, with bounds": "meet"}
    rows = list[Row]()
    for name, some in given.items():
        for rho in map(float, trust.split(",")):
            exact = some.solve(trust=rho, tol=1e-6, max_steps=100).log_probs.double()
            for label, rule in rules.items():
                found = some.solve(rule, trust=rho)
                far = total_variation(found.log_probs.double(), exact)
                taken = median(seconds(partial(some.solve, rule, trust=rho), repeats, 0))
                rows.append({
                    "members": name, "trust": rho, "rule": label, "passes": found.num_passes.mean().item(),
                    "TV, mean": far.mean().item(), "largest": far.max().item(), "ms a row": 1e3 * taken / len(far),
                })  # fmt: skip
    show("meet after a few steps", rows, json, threads=threads)


V, WIDTH, BATCH = 32_768, 512, 2
POINTS: dict[str, list[tuple[float, int, tuple[int, ...], int]]] = {
    "v": [(v, v, (WIDTH, WIDTH), BATCH) for v in (4096, 8192, 16_384, 32_768, 65_536, 131_072)],
    "D": [(2 * d, V, (d, d), BATCH) for d in (32, 64, 128, 256, 512, 1024, 2048)],
    "n": [(n, V, (256,) * n, BATCH) for n in (2, 4, 8)],
    "batch": [(b, V, (WIDTH, WIDTH), b) for b in (1, 4, 16, 64)],
}


@app.command()
def growth(
    quick: Annotated[bool, typer.Option(help="Fewer and smaller points: under two minutes.")] = False,
    trust: Trust = 1.0,
    tol: Tol = 1e-5,
    threads: Threads = 1,
    json: JsonPath = None,
) -> None:
    """Time a row as v, D, n or the batch grows.

    One quantity varies at a time around v = 32,768 and two heads of 512 (of 256 where n varies); exponents are
    least-squares fits on logarithms.
    """
    rows, fits = list[Row](), dict[str, float]()
    for name, points in POINTS.items():
        chosen, own = [p for p in points if not quick or p[1] * sum(p[2]) * p[3] <= 2**26], list[Row]()
        for x, v, widths, batch in track(chosen, description=name, transient=True):
            given = correlated(v, widths, batch)
            for head in given.heads:
                head.whitening()
            found = given.solve(trust=trust, tol=tol)
            taken = median(seconds(partial(given.solve, trust=trust, tol=tol), 3, 0))
            own.append({
                "varies": name, "value": int(x), "ms a row": 1e3 * taken / batch,
                "passes, median": found.num_passes.median().item(),
                "solved": f"{int((found.status == 0).sum())} of {batch}",
            })  # fmt: skip
        rows += own
        sizes, times = (np.log([row[what] for row in own]) for what in ("value", "ms a row"))
        fits[name] = float(np.polyfit(sizes, times, 1)[0]) if len(own) > 1 else float("nan")
    told = ", ".join(f"{k} {e:.2f}" for k, e in fits.items())
    show(f"growth around v = 32,768, D = 1,024, n = 2; exponents: {told}", rows, json, exponents=fits)


# They choose between the two methods, or belong to the other one.
CHOICES = ("HESSIAN", "HESSIAN_WHERE_FINE", "HESSIAN_AS_RESCUE", "FINE", "FAR")


@app.command("tuning")
def of_constants(
    v: Annotated[int, typer.Option()] = 32768,
    width: Annotated[int, typer.Option()] = 512,
    rows: Annotated[int, typer.Option(help="Of each kind.")] = 8,
    trust: Trust = 1.0,
    repeats: Repeats = 3,
    name: Annotated[list[str] | None, typer.Option(help="Constants to measure; all by default.")] = None,
    json: JsonPath = None,
) -> None:
    """Measure what each constant of the solver costs at half and at double its value.

    All rows are solved by dense steps: with bounds, as `combine` solves them, and on estimates, as decoding does.
    Counts of head passes and steps do not depend on the machine; times are medians, as a ratio to that of the constants
    as they are.
    """
    torch.set_num_threads(1)
    kinds = {f"two members of {v} x {width}": correlated(v, (width, width), rows)}
    kinds["the wide family"] = held_out("wide", rows)
    every = {own: value for own, value in vars(constants).items() if own.isupper() and own not in CHOICES}
    for kind, instance in kinds.items():
        with mock.patch.multiple(constants, HESSIAN=0, HESSIAN_WHERE_FINE=0):
            figures, usual = _by_constants(instance, trust, repeats)
            table: list[Row] = [{"constant": "as they are", "value": "", **figures, "time": 1.0}]
            for constant, value in every.items():
                for factor in (0.5, 2) if not name or constant in name else ():
                    other = type(value)(value * factor) or 1
                    with mock.patch.object(constants, constant, other):
                        figures, taken = _by_constants(instance, trust, repeats)
                    table.append({"constant": constant, "value": f"{other:g}", **figures, "time": taken / usual})
        show(f"{kind}, {rows} rows, trust {trust:g}, tol 1e-3", table, json)


def _by_constants(rows: Rows, trust: float, repeats: int) -> tuple[Row, float]:
    """Return head passes and steps a row with bounds and without, and the median seconds of both together."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        bounded, estimated = rows.solve(trust=trust), rows.solve(Meet(budget=50), trust=trust)
        taken.append(time.perf_counter() - start)
        for head in rows.heads:
            head.tails.clear()
    return {
        "passes": bounded.num_passes.mean().item(), "steps": bounded.num_steps.double().mean().item(),
        "passes, estimated": estimated.num_passes.mean().item(),
    }, median(taken)  # fmt: skip


if __name__ == "__main__":
    app()
