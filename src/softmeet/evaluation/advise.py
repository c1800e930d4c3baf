"""Advice on whether members are worth combining: a fit by folds, the movement by ``meet``, and measured costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from softmeet.ensemble import Ensemble
from softmeet.evaluation.candidates import Begin, Candidate, Options, sample_size
from softmeet.evaluation.choices import RuleChoice
from softmeet.evaluation.claimed import beside
from softmeet.evaluation.costs import Others, ensemble_run, member_runs, milliseconds, written
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import Fitted, fit
from softmeet.evaluation.intervals import Clusters, Difference, paired
from softmeet.evaluation.judged import Gated, Judged
from softmeet.evaluation.own_files import Beside, Worth, behind_header
from softmeet.evaluation.perplexity import evaluate_positions, evaluate_text
from softmeet.evaluation.positions import Positions
from softmeet.evaluation.scores import Evaluation
from softmeet.heads import SoftmaxHead
from softmeet.hf.configuration import EnsembleConfig
from softmeet.members.member import short
from softmeet.rules.values import POOLS
from softmeet.scaling.base import Engine

# Log-probabilities of all members, tokens, and symbols that are read one by one, that a budget of minutes allows.
_ELEMENTS, _TOKENS, _SYMBOLS = 2_000_000_000, 20_000, 40_000
# Bytes that a token has at the most, in most texts.
_BYTES_OF_TOKEN = 4
# With what texts of the members' own begin, and how many each writes; one token more is drawn for so many, and at most
# so many times as many as are asked for.
_BEGINNING, _ROWS, _SPARE, _MOST = "The", 5, 16, 4
# At most and at least so many positions at which ``meet`` is compared with its pool, and log-probabilities of a member
# there; the mean total variation between the two below which ``meet`` is not tried on more; the trusts that are tried,
# and at how many positions.
_COMPARED, _COMPARED_LEAST, _COMPARED_ELEMENTS = 96, 32, 4_000_000
_UNMOVED, _TRUSTS, _TRIED = 0.005, (0.3, 1.0), 6000
# If the solver takes long, ``meet`` is tried at as many positions as take so many seconds, and not at all if these are
# fewer than so many.
_SECONDS, _FEWEST = 100.0, 500


def within_budget(ensemble: Ensemble, documents: Sequence[Document], most: int | None = None) -> list[Document]:
    """Return the documents, the longer ones shortened, so that advice on them takes minutes.

    Args:
        ensemble: the members.
        documents: the text.
        most: the most bytes in all; None for what members of this number and vocabulary can read within minutes.
    """
    model = ensemble.model
    afforded = _ELEMENTS // (len(ensemble.names) * model.config.vocab_size)
    tokens = min(max(1000, min(_TOKENS, afforded)), _SYMBOLS // model.symbols_of_token)
    left = most or _BYTES_OF_TOKEN * tokens
    sizes, share = sorted(len(document.text.encode()) for document in documents), 0
    # Short documents leave more to long ones.
    for k, size in enumerate(sizes):
        share = left // (len(sizes) - k)
        if size > share:
            break
        left, share = left - size, size
    return [replace(document, text=document.text.encode()[:share].decode(errors="ignore")) for document in documents]


def own_documents(
    ensemble: Ensemble, tokens: int, begin: Begin = lambda description, done, total: lambda count: None
) -> list[Document]:
    """Return texts that the members write, each as much, by themselves, with fixed seeds.

    As a text is read in tokens of the tokenizer's choice, it may have fewer than were drawn: some more are drawn.

    Args:
        ensemble: the members.
        tokens: at least how many tokens (over bytes: bytes) can be predicted of them in all.
        begin: as of :func:`softmeet.evaluation.fit.fit`.
    """
    names, found = ensemble.names, list[Document]()
    each = math.ceil(tokens / (_ROWS * len(names)))
    first = each + each // _SPARE + 1
    advance = begin(f"the members write a text, in {ensemble.model.config.vocabulary}", 0, first * _ROWS * len(names))

    def predicted(text: str) -> int:
        return len(ensemble.tokenizer(text, verbose=False)["input_ids"]) - 1

    def goes_on(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        advance(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    for i in range(len(names)):
        alone = part(ensemble, [i], {"rule": POOLS[0], "weights": [1.0]})
        many, missing, made = first, 0, list[str]()
        while not made or (missing > 0 and many < _MOST * each):
            many += missing
            told = written([_BEGINNING] * _ROWS, alone, many, seed=i, top_k=0, stopping_criteria=[goes_on])
            made = [_BEGINNING + text for text in told]
            missing = each - min(map(predicted, made))
        found += [Document(f"{short(names[i])} {k + 1}", text) for k, text in enumerate(made)]
    return found


def meet_beside_pool(
    ensemble: Ensemble, positions: Positions, begin: Begin, engine: Engine | None, cache: PieceCache | None
) -> Evaluation | None:
    """Score ``meet`` and its pool, with the ensemble's settings, at some positions evenly spread over a text.

    The scores of ``meet`` have its movement. The result is None where ``meet`` cannot be or is nothing of its own: over
    bytes, for one member, or where a head cannot be read.
    """
    model = ensemble.model
    if len(ensemble.names) == 1 or not all(isinstance(head, SoftmaxHead) for head in model.combiner.heads):
        return None
    settings = {"rule": "meet", "trust": 0.3, "weights": [1 / len(ensemble.names)] * len(ensemble.names)}
    many = min(len(positions), _COMPARED, max(_COMPARED_LEAST, _COMPARED_ELEMENTS // model.config.vocab_size))
    few = positions.take(torch.arange(many) * len(positions) // many)
    choices = [RuleChoice("meet", settings), RuleChoice(POOLS[0], settings | {"rule": POOLS[0]})]
    advance = begin("comparing meet with its average, in tokens", 0, many)
    where: dict[str, Any] = {"engine": engine, "cache": cache, "stage": "movement"}
    return evaluate_positions(ensemble, few, choices, **where, on_progress=advance)


@dataclass(frozen=True)
class Alternative:
    """One model in place of an ensemble: what it makes of the same text in its own tokens.

    Attributes:
        name: the model's.
        nats: its loss in each document, (D,), in nats.
        sizes: the bytes that it predicted of each document, (D,).
        time: the milliseconds that it takes to write a byte.
    """

    name: str
    nats: torch.Tensor
    sizes: torch.Tensor
    time: float


def alternative(
    name: str, documents: Sequence[Document], loading: Mapping[str, Any], begin: Begin, *, bos: bool
) -> Alternative:
    """Load one model, read a text by it, and measure how long it takes to write a byte.

    Args:
        name: the model's, as a member is named.
        documents: the text.
        loading: keyword arguments of ``Ensemble.from_pretrained``.
        begin: as of :func:`softmeet.evaluation.fit.fit`.
        bos: whether documents begin with the token for the beginning of a text.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    begin(f"loading {short(name)}", 0, None)
    ensemble = Ensemble.from_pretrained([name], POOLS[0], **loading)
    reading = f"reading the text by {short(name)}, in {ensemble.model.config.vocabulary}"
    found = evaluate_text(ensemble, documents, [], bos=bos, begin=partial(begin, reading, 0))
    begin(f"measuring what {short(name)} costs", 0, None)
    (scores,), each = found.members.values(), Clusters(found.positions.document, "documents")
    ((run, rate),) = member_runs(ensemble, documents[0].text)
    return Alternative(
        ensemble.names[0], each.sums(scores.nats), each.sums(found.positions.sizes), milliseconds([run])[0] * rate
    )


@dataclass
class Advice:
    """Advice on some members: what a text says about them, and what they and what is advised cost.

    Attributes:
        judged: what the text says.
        verdict: ``single``, ``average``, ``meet`` or ``gate``.
        candidate: whose settings are advised.
        nats: the losses that judge it, (N,); None for a single member without any ensemble.
        gated: the gate, for the verdict ``gate``.
        time: the milliseconds that a byte takes by what is advised.
        busy: the share of the processors that other programs took while times were measured.
        alternatives: single models that could take the ensemble's place.
        files: what files add to what is advised; None without files.
    """

    judged: Judged
    verdict: str
    candidate: Candidate
    nats: torch.Tensor | None
    gated: Gated | None
    time: float
    busy: float = 0.0
    alternatives: list[Alternative] = field(default_factory=list)
    files: Beside | None = None

    @property
    def losses(self) -> torch.Tensor:
        """The losses of what is advised, in nats, (N,), with files if they pay."""
        bare = self.judged.base if self.verdict == "single" or self.nats is None else self.nats
        return bare if self.files is None or not self.files.pays else beside(bare, self.judged.found.positions.claims)

    @property
    def fitted(self) -> Fitted:
        """The fit, with what is advised as the candidate that is chosen."""
        return replace(self.judged.fitted, chosen=replace(self.candidate, settings=self._ordered()[1]))

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble that is advised, with the member that answers alone first if there is a gate, and with files."""
        found = part(self.judged.ensemble, *self._ordered())
        return with_files(found, self.judged.ensemble) if self.files is not None and self.files.pays else found

    def _ordered(self) -> tuple[list[int], dict[str, Any]]:
        """Return (the numbers of the members in the ensemble that is advised, in order; its settings)."""
        order, settings = list(range(len(self.judged.names))), dict(self.candidate.settings)
        if self.verdict == "single":
            order = [self.judged.names.index(self.judged.best)]
            settings |= {"weights": [1.0], "trust": [0.0]}
        if self.gated:
            order = [self.gated.member, *(k for k in order if k != self.gated.member)]
            settings |= {name: [settings[name][k] for k in order] for name in ("weights", "trust")}
            settings["gate"] = self.gated.gate
        return order, settings

    def instead(self) -> tuple[Alternative, Difference] | None:
        """Return the alternative that costs no more than what is advised and is better, if there is one.

        It comes with its gain over what is advised, in bits a byte, whose 95 % interval does not hold zero.
        """
        found = [(own, self.against(own)) for own in self.alternatives if own.time <= self.time]
        return max((pair for pair in found if pair[1].low > 0), key=lambda pair: pair[1].mean, default=None)

    def against(self, own: Alternative) -> Difference:
        """Return the gain, in bits a byte, of an alternative over what is advised, paired by document.

        Where the two predicted different numbers of a document's bytes, as their first tokens may differ, the
        alternative's loss is scaled to those of the ensemble.
        """
        judged = self.judged
        sizes = judged.documents.sums(judged.bytes)
        ours = judged.documents.sums(self.losses)
        theirs, each = own.nats * sizes / own.sizes, Clusters(torch.arange(len(sizes)), "documents")
        return paired(ours / math.log(2), theirs / math.log(2), each, sizes)


def part(ensemble: Ensemble, order: Sequence[int], settings: dict[str, Any]) -> Ensemble:
    """Return an ensemble of some members, numbered from 0, with other settings; it shares their weights."""
    before = ensemble.model.config
    names = [ensemble.names[k] for k in order]
    kept: dict[str, Any] = {"vocabulary": before.vocabulary, "prune": before.prune}
    if before.prefixes is not None:
        kept["prefixes"] = [before.prefixes[k] for k in order]
    return Ensemble(ensemble.model.part(order, EnsembleConfig(names, **settings, **kept)), ensemble.tokenizer)


def with_files(ensemble: Ensemble, whole: Ensemble) -> Ensemble:
    """Have an ensemble, which is returned, have the files of another one with the same symbols."""
    ensemble.model.config.files, ensemble.model.claimants = whole.model.config.files, whole.model.claimants
    return ensemble


def _files(advice: Advice, positions: Positions, text: str, held_out: int) -> Beside:
    """Return what files add to what is advised, in bits and in time.

    Args:
        advice: without files.
        positions: the whole text's.
        text: of which the first bytes are the prompt when time is measured.
        held_out: how many of the files the text is; 0 for another text.
    """
    judged, whole = advice.judged, advice.judged.ensemble
    worth, late = Worth.of(judged.found.positions, advice.losses, judged.within), None
    if len(judged.found.positions) == len(positions):
        rows = behind_header(positions)
        late = Worth.of(positions.take(rows), advice.losses[rows], judged.within.take(rows)) if len(rows) else None
    runs = [ensemble_run(advice.ensemble, text), ensemble_run(with_files(advice.ensemble, whole), text)]
    bare, ours = milliseconds([run for run, _ in runs])
    assert worth is not None, "the files have claimed at each place"
    names = tuple(reader.name for reader in whole.model.claimants)
    return Beside(names, worth, late, held_out, ours / bare if bare > 0 else 1.0)


def advise(
    ensemble: Ensemble,
    documents: Sequence[Document],
    positions: Positions,
    *,
    held_out: bool = False,
    folds: int = 5,
    begin: Begin = lambda description, done, total: lambda count: None,
    engine: Engine | None = None,
    cache: PieceCache | None = None,
) -> Advice:
    """Fit by folds, see whether ``meet`` differs from its pool, measure costs, and judge.

    Args:
        ensemble: the members.
        documents: the text.
        positions: its positions, with hidden states, as :func:`observe_text` returns them.
        held_out: whether the documents are files that were held out of those beside the ensemble.
        folds: the number of folds that documents are dealt out to.
        begin: as of :func:`softmeet.evaluation.fit.fit`.
        engine: evaluates losses and scores; None for this process.
        cache: keeps evaluations and scores.

    Raises:
        InvalidInputError: if the text has fewer documents (or blocks) than folds.
    """
    start = time.perf_counter()
    compared = meet_beside_pool(ensemble, positions, begin, engine, cache)
    seconds = (time.perf_counter() - start) / max(1, 0 if compared is None else len(compared.positions))
    # Kept, as a run that goes on does not solve them again.
    afforded = (cache or PieceCache()).get("afforded", lambda: {"": torch.tensor(_SECONDS / seconds)})[""].item()
    moved = compared is not None and compared.choices["meet"].moved().total_variation.mean().item() >= _UNMOVED
    meets = moved and afforded >= _FEWEST
    options = Options(
        folds=folds,
        meets=False,
        fit_positions=sample_size(ensemble),
        trusts=_TRUSTS if meets else (),
        judge_positions=min(_TRIED, int(afforded)) if meets else None,
    )
    fitted = fit(ensemble, positions, options, begin, engine=engine, cache=cache)
    begin("measuring what members cost", 0, None)
    text, others = max((document.text for document in documents), key=len), Others()
    runs = member_runs(ensemble, text)
    times = [ms * rate for ms, (_, rate) in zip(milliseconds([run for run, _ in runs]), runs, strict=True)]
    too_long = _SECONDS / afforded * len(_TRUSTS) * len(positions) if moved and not meets else None
    judged = Judged(ensemble, fitted, times, compared, too_long)
    found = Advice(judged, *judged.chosen(), time=times[judged.names.index(judged.best)])
    if found.verdict != "single":
        begin("measuring what the ensemble costs", 0, None)
        # Side by side with the best member, so that the ratio can be relied on where the machine has slowed down.
        both = [runs[judged.names.index(judged.best)], ensemble_run(found.ensemble, text)]
        alone, ours = (ms * rate for ms, (_, rate) in zip(milliseconds([run for run, _ in both]), both, strict=True))
        found.time *= ours / alone if alone > 0 else 1.0
    if positions.claims:
        begin("measuring what the files cost", 0, None)
        found.files = _files(found, positions, text, len(documents) if held_out else 0)
    found.busy = others.share()
    return found
