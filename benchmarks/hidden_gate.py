"""A gate on hidden states, tried and not built: python benchmarks/hidden_gate.py --trace TRACE

Weights of the probability mean become a softmax of a linear map of all members' last hidden states, fitted with a
ridge on four folds of the documents and judged on the fifth; a second one also sees features of the members'
predictions: entropies, largest probabilities, and the decayed losses so far. Beside them stand fixed fitted weights and
weights that adapt to the document. Differences from the fixed weights are in nats a token, 95 %, by document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float
from torch import Tensor

from report import show
from softmeet import Ensemble
from softmeet.evaluation.folds import folds_of
from softmeet.evaluation.intervals import clusters, paired
from softmeet.evaluation.trace import Trace
from softmeet.members.weighting import Adaptation, faded
from softmeet.rules.values import POOLS

FOLDS = 5
RIDGES = (0.003, 0.03, 0.3, 3.0)
ADAPTATIONS = tuple(Adaptation(decay, t) for decay in (0.8, 0.9, 0.95, 0.98) for t in (0.2, 0.4, 0.8, 1.6))


@torch.inference_mode()
def known(ensemble: Ensemble, positions: Any) -> tuple[Float[Tensor, "n N"], Float[Tensor, "N f"]]:
    """The members' losses, and features of their predictions: entropies and largest log-probabilities."""
    nats, features = list[Tensor](), list[Tensor]()
    for chunk in positions.chunks(16):
        log_p, _ = ensemble.model.combiner.own_log_probs(chunk.hidden)
        nats.append(-log_p.gather(-1, chunk.targets.expand(len(log_p), -1)[..., None]).squeeze(-1).double())
        entropy = -(log_p.exp() * log_p).sum(-1)
        features.append(torch.cat([entropy, log_p.amax(-1)]).T)
    return torch.cat(nats, -1), torch.cat(features)


def mixture(nats: Float[Tensor, "n N"], log_w: Float[Tensor, "n N"]) -> Float[Tensor, " N"]:
    """Losses of a probability mean with weights of its own at every position."""
    return -(log_w - nats).logsumexp(0)


def fitted(nats: Float[Tensor, "n N"], x: Float[Tensor, "N f"], ridge: float) -> tuple[Tensor, Tensor]:
    """The linear map and the constants of least loss, by L-BFGS, with ``ridge`` times the mean square of the map."""
    n = len(nats)
    at = torch.zeros(n, x.shape[1], requires_grad=True)
    constant = torch.zeros(n, requires_grad=True)
    steps = torch.optim.LBFGS([at, constant], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        steps.zero_grad()
        found = mixture(nats.float(), (at @ x.T + constant[:, None]).log_softmax(0)).mean() + ridge * (at**2).sum()
        found.backward()
        return torch.as_tensor(found)

    steps.step(loss)
    return at.detach(), constant.detach()


def gated(nats: Float[Tensor, "n N"], x: Float[Tensor, "N f"], fit_on: Tensor, at: Tensor, ridge: float) -> Tensor:
    """Losses at some positions of a gate that was fitted at others."""
    slope, constant = fitted(nats[:, fit_on], x[fit_on], ridge)
    log_w: Tensor = (slope @ x[at].T + constant[:, None]).log_softmax(0)
    return mixture(nats[:, at], log_w.double())


def scaled(x: Float[Tensor, "N f"], elsewhere: Tensor) -> Float[Tensor, "N f"]:
    """Features with mean 0 and a square of 1 over all of them together, by the positions ``elsewhere``."""
    mean, spread = x[elsewhere].mean(0), x[elsewhere].std(0).clamp_min(1e-6)
    found: Tensor = (x - mean) / spread / x.shape[1] ** 0.5
    return found.float()


def main(
    trace: Annotated[list[Path], typer.Option(help="A trace by softmeet trace; repeat it.")],
    out: Annotated[Path | None, typer.Option("--json", help="JSON of all figures.")] = None,
) -> None:
    """Print a table."""
    rows = list[dict[str, Any]]()
    for folder in trace:
        opened = Trace.open(folder)
        ensemble = Ensemble.from_pretrained(opened.members, POOLS[0], weights=[1] * len(opened.members))
        positions = opened.read()
        nats, features = known(ensemble, positions)
        within = clusters(positions.document)
        fold, n = folds_of(within, FOLDS), len(nats)
        hidden = torch.cat([own.float() for own in positions.hidden], -1)
        past = torch.stack([faded(nats, positions.document, decay) for decay in (0.8, 0.95)]).flatten(0, 1).T
        kinds = {"hidden states": hidden, "features": torch.cat([features, past], -1).float()}
        kinds["both"] = torch.cat([hidden, kinds["features"]], -1)
        losses = {name: torch.zeros_like(nats[0]) for name in ("fixed", "adaptive", *kinds)}
        for k in range(FOLDS):
            elsewhere, here = fold != k, fold == k
            # An inner fold chooses the ridge and the adaptation.
            inner, choosing = elsewhere & (fold != (k + 1) % FOLDS), fold == (k + 1) % FOLDS
            _, constant = fitted(nats[:, elsewhere], torch.zeros(int(elsewhere.sum()), 1), 1.0)
            prior = constant.double().softmax(0)
            losses["fixed"][here] = mixture(nats[:, here], prior.log()[:, None])
            tried = [mixture(nats, how.weights(prior.tolist(), nats, positions.document).log()) for how in ADAPTATIONS]
            losses["adaptive"][here] = min(tried, key=lambda own: own[elsewhere].mean().item())[here]
            for name, x in kinds.items():
                own = scaled(x, elsewhere)

                ridge = min(RIDGES, key=lambda r, x=own: gated(nats, x, inner, choosing, r).mean().item())  # type: ignore[misc]
                losses[name][here] = gated(nats, own, elsewhere, here, ridge)
        for name, own in losses.items():
            rows.append(
                {
                    "trace": folder.name, "weights": name, "nats": own.mean().item(),
                    "against fixed ones": "" if name == "fixed" else str(paired(own, losses["fixed"], within)),
                }
            )  # fmt: skip
        rows.append({"trace": folder.name, "weights": "best member", "nats": nats.mean(-1).min().item(), "": ""})
        assert n == len(opened.members)
    rows = [{**row, "against fixed ones": row.get("against fixed ones", "")} for row in rows]
    show("A gate on hidden states", [{k: v for k, v in row.items() if k} for row in rows], out)


if __name__ == "__main__":
    typer.run(main)
