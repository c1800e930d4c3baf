"""What each member of an ensemble reads of its own.

A *prefix* is what a member alone reads before every text, as ids of tokens; its keys and values are kept. A prompt of
its own takes the place of the whole prompt that the members share, as where its template has something behind the text.
What is generated follows either, token by token, and is the same for all members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError
from softmeet.hf.configuration import EnsembleConfig
from softmeet.members.member import SLOT, Member
from softmeet.members.prompting import prefix_of
from softmeet.members.trunk import require_cache

_LIMIT = "max_position_embeddings"
Ids = Sequence[int]


@dataclass(frozen=True)
class OwnPrompt:
    """What members read of their own in place of a prompt that they share.

    Attributes:
        replaced: how many of the shared tokens that is.
        ids: for each member its own tokens; None for its prefix and the shared ones.
    """

    replaced: int
    ids: Sequence[Ids | None]


class Contexts:
    """What each member of an ensemble reads before a text.

    Args:
        names: the members' names, for messages.
        models: the members' models; some may be the same object.
        prefixes: for each member the ids of what it reads before every text; None for nothing.
        begin: the id of the token that begins a text; a member that has read one does not read another.

    Attributes:
        members: the members' descriptions.

    Raises:
        InvalidInputError: if a prefix has an id that its member does not know, or its member takes no cache.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[PreTrainedModel],
        prefixes: Sequence[Ids | None] | None = None,
        begin: int | None = None,
    ) -> None:
        self.prefixes = [tuple(own or ()) for own in prefixes or [()] * len(models)]
        self.members, self._models, self._begin = [Member.of(name) for name in names], models, begin
        for name, model, own in zip(names, models, self.prefixes, strict=True):
            known = range(model.get_input_embeddings().weight.shape[0] if own else 0)
            if wrong := [token for token in own if isinstance(token, bool | str) or token not in known]:
                raise InvalidInputError(
                    f"expected a prefix of token ids of {name}, from 0 to {len(known) - 1}, got {wrong[0]!r}"
                )
            if own:
                require_cache(model)

    @classmethod
    def of(
        cls, config: EnsembleConfig, models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase
    ) -> Contexts:
        """Return the contexts of an ensemble's members: of its configuration's prefixes, else of the members' prompts.

        Args:
            config: the ensemble's configuration.
            models: the members' models.
            tokenizer: the members' common one.
        """
        prompts = [prefix_of(Member.parse(name), tokenizer) for name in config.members]
        return cls(config.members, models, config.prefixes or prompts, tokenizer.bos_token_id)

    def require_no_template(self, i: int | None = None) -> None:
        """Check that member i, or every member, reads texts behind its prompt, so that every token can be predicted.

        Raises:
            InvalidInputError: if a member has a template with something behind the text; the message names it.
        """
        for member in self.members if i is None else self.members[i : i + 1]:
            if member.is_template:
                raise InvalidInputError(
                    f"expected prompts that a text follows, but {member.title} has a template, which is for generation "
                    f"alone: leave out what its prompt has behind {SLOT}"
                )

    def before(self, i: int, ids: Ids, own: OwnPrompt | None = None) -> tuple[Ids, int]:
        """Return what member i reads of its own at the beginning of a sequence, and in place of how many tokens.

        Args:
            i: the member's number.
            ids: the tokens that members share.
            own: the members' own prompts in place of the first of them; None for none.

        Raises:
            InvalidInputError: if the member has a template, and no prompt of its own.
        """
        mine = None if own is None else own.ids[i]
        if own is not None and mine is not None:
            return mine, own.replaced
        self.require_no_template(i)
        before = self.prefixes[i]
        if not before or list(ids[:1]) != [self._begin]:
            return before, 0
        # The text begins with the prefix now.
        return (*ids[:1], *before[before[:1] == (self._begin,) :]), 1

    def room(self, own: Sequence[Ids | None]) -> int:
        """Return how many tokens fit behind prompts of the members' own; 2³⁰ if nothing limits it.

        Args:
            own: for each member its own prompt, or None; empty for None for all.
        """
        limits = [getattr(model.config.get_text_config(decoder=True), _LIMIT, None) for model in self._models]
        pairs = zip(limits, own, strict=bool(own))
        return min((max(limit - len(ids), 0) for limit, ids in pairs if limit and ids is not None), default=1 << 30)
