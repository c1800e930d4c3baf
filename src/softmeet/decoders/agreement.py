"""Agreement: beam search in which members keep their own tokens, and hypotheses agree on bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from softmeet.decoders.base import Decoding, ToWrite, WeightedText
from softmeet.decoders.extensions import Hypothesis, Track, Way, best_ends, best_extensions
from softmeet.decoders.own_tokens import OwnTexts, OwnTokensDecoder


class Agreement(OwnTokensDecoder):
    """Search for the text of the largest Σ w_i log P_i, each P_i of the tokens in which member i writes it.

    A hypothesis is a text that each member has in tokens of its own, of which some may have written more bytes than
    others, but each as the beginning of the longest. In a step the members with the longest string wait, unless all
    strings are equal, and the others add a token each; all ways are tried after which each string is again the
    beginning of the longest. Where all strings are equal, all members may end the text, at once. Ways are ordered by
    Σ w_i log P_i / t_i, t_i being how many tokens member i has written, and the best ``beam`` go on; those that have
    ended are set aside. The search is over with ``beam`` texts that have ended, or after as many steps as the limit of
    tokens says, in which no member writes more tokens than that. Then the text of the largest Σ w_i log P_i is chosen
    among those that have ended, and if none has, among those of the last step, of which the longest string counts.

    What members predict of tokens that spell nothing and end nothing, as those of chats, is left out. A member of
    weight 0 does not change a score, but has to agree. From Wicks et al. (Token-level ensembling of models with
    different vocabularies, arXiv:2502.21265), with the waiting of their code, where from three members on all but the
    longest write, not the shortest alone; but that code counts a token more in t_i for one that waits.
    """

    beam: int = Field(default=5, ge=1, le=256)
    """The number of hypotheses that are kept."""

    name = "agreement"
    summary = "beam search by members in their own tokens that agree on bytes (ABE)"
    reference = "https://arxiv.org/abs/2502.21265"

    def rows(self, members: int) -> int:
        """Return how many hypotheses are kept."""
        return self.beam

    def decode(self, texts: Sequence[OwnTexts], job: ToWrite) -> list[Decoding]:
        """Search behind each of B prompts, and read the newest tokens of all searches together."""
        weights: Any = job.settings.weights
        searches = [_Search(texts, weights, k * self.beam, self.beam) for k in range(job.prompts)]
        for _ in range(job.most):
            live = [one for one in searches if not one.over]
            for i, own in enumerate(texts):
                unread = [beam for one in live for beam in one.beams if beam.hypothesis.predicted[i] is None]
                if unread:
                    told = own.texts.log_probs([beam.row for beam in unread])[0].numpy()
                    for beam, log_probs in zip(unread, told, strict=True):
                        beam.learn(i, log_probs)
            for one in live:
                one.extend()
        return [one.found() for one in searches]


@dataclass(eq=False)
class _Beam:
    """A hypothesis, and the row in which all members read it."""

    hypothesis: Hypothesis
    row: int

    def learn(self, i: int, log_probs: Any) -> None:
        """Note what member i predicts."""
        before = self.hypothesis.predicted
        self.hypothesis = Hypothesis(self.hypothesis.tracks, (*before[:i], log_probs, *before[i + 1 :]))


class _Search:
    """A search behind one prompt.

    Args:
        texts: of each member its own.
        weights: of each member.
        start: the first of the search's rows.
        beam: how many rows it has.

    Attributes:
        beams: the hypotheses that go on; of a search that is over, those of its last step.
        over: whether it is over.
    """

    def __init__(self, texts: Sequence[OwnTexts], weights: Sequence[float], start: int, beam: int) -> None:
        self._texts, self._weights, self._rows, self._beam = texts, weights, range(start, start + beam), beam
        nothing = Hypothesis((Track(),) * len(texts), (None,) * len(texts))
        self.beams, self.over = [_Beam(nothing, start)], False
        self._ended = list[Hypothesis]()

    def extend(self) -> None:
        """Go on by a step."""
        given = [one.hypothesis for one in self.beams], [own.tokens for own in self._texts], self._weights
        ways = [*best_extensions(*given, self._beam), *best_ends(*given, self._beam - len(self._ended))]
        following = list[Way]()
        for way in sorted(ways, key=lambda one: one.key):
            if self._beam in (len(following), len(self._ended)):
                break
            if way.ends:
                self._ended.append(self._extended(way))
            else:
                following.append(way)
        self.over = not following or len(self._ended) == self._beam
        if self.over:
            for own in self._texts:
                own.texts.finish(self._rows)
        else:
            self._follow(following)

    def _extended(self, way: Way) -> Hypothesis:
        parent = self.beams[way.parent].hypothesis
        tracks, predicted = list(parent.tracks), list(parent.predicted)
        for i, (before, token, own) in enumerate(zip(parent.tracks, way.picks, self._texts, strict=True)):
            if token is not None:
                log_prob = before.log_prob + float(parent.log_probs(i)[token])
                tracks[i] = Track((*before.ids, token), before.text + own.tokens.spelled([token]), log_prob)
                predicted[i] = None
        return Hypothesis(tuple(tracks), tuple(predicted))

    def _follow(self, ways: Sequence[Way]) -> None:
        """Put extensions in place of the hypotheses: the first of each into its row, others into rows that are free."""
        sources = [self.beams[way.parent].row for way in ways]
        free = [row for row in self._rows if row not in sources]
        rows = list[int]()
        for source in sources:
            rows.append(free.pop() if source in rows else source)
        copied = [(row, source) for row, source in zip(rows, sources, strict=True) if row != source]
        for i, own in enumerate(self._texts):
            own.texts.replace([row for row, _ in copied], [source for _, source in copied])
            own.texts.finish(free)
            added = [(row, token) for row, way in zip(rows, ways, strict=True) if (token := way.picks[i]) is not None]
            own.texts.add([row for row, _ in added], [token for _, token in added])
        self.beams = [_Beam(self._extended(way), row) for way, row in zip(ways, rows, strict=True)]

    def found(self) -> Decoding:
        """Return the texts that have ended, or those of the last step, and choose the best."""
        every = self._ended or [one.hypothesis for one in self.beams]
        texts = tuple(self._text(one, ended=bool(self._ended)) for one in every)
        return Decoding(texts, max(range(len(texts)), key=lambda k: texts[k].log_weight))

    def _text(self, one: Hypothesis, *, ended: bool) -> WeightedText:
        log_probs = tuple(track.log_prob for track in one.tracks)
        score = sum(w * own for w, own in zip(self._weights, log_probs, strict=True))
        return WeightedText(one.tracks[0].ids, ended, score, log_probs, one.text.decode(errors="replace"))
