"""``UnionEnsembleForCausalLM``: members with any vocabularies, combined over the union of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softmeet.errors import InvalidInputError
from softmeet.hf.configuration import EnsembleConfig
from softmeet.hf.contexts import Contexts
from softmeet.hf.modeling import EnsembleForCausalLM
from softmeet.hf.union_space import UnionSpace
from softmeet.hf.unread import require_known
from softmeet.hf.vocabulary import require_for_bytes, require_one_prompt
from softmeet.members.heads import replace_weight
from softmeet.members.member import Member
from softmeet.members.opaque import Head
from softmeet.members.prompting import ids_of, prefix_of
from softmeet.members.spelling import Spelling
from softmeet.readers.reader import Reader
from softmeet.readers.union_tokens import crossing
from softmeet.rules.settings import Settings


class UnionEnsembleForCausalLM(EnsembleForCausalLM):
    """A causal LM over the byte strings of all members' tokens, and one symbol for the end of a text.

    Each member reads prompts as its own tokenizer cuts them, and a symbol as its token of that byte string or, where it
    has none, as the tokens into which its tokenizer cuts it. ``input_ids`` are symbols. A text has no one likelihood,
    as it can be written in many ways: scoring is refused.

    Args:
        config: the settings; ``config.members`` names the members.
        members: the models, in the order of ``config.members``.
        tokenizers: of each.
        space: the union.

    Raises:
        UnsupportedHeadError: if the rule needs softmax matrices, which have no rows for the union.
        InvalidInputError: if there are no members, or they have prompts of their own where all read one.
    """

    cuts_alone = True

    def __init__(
        self,
        config: EnsembleConfig,
        members: Sequence[PreTrainedModel] | None = None,
        tokenizers: Sequence[PreTrainedTokenizerBase] = (),
        space: UnionSpace | None = None,
    ) -> None:
        if members is None or space is None:
            raise InvalidInputError("expected loaded members of an ensemble over a union: load it by Ensemble")
        require_one_prompt(config)
        super().__init__(config, members)
        self._heads, self.space, self._tokenizers = self.combiner.heads, space, list(tokenizers)
        prompts = [prefix_of(Member.parse(name), own) for name, own in zip(config.members, tokenizers, strict=True)]
        self.contexts = Contexts(config.members, list(members), config.prefixes or prompts)
        # A symbol is a token or more, so that a text has no more symbols than a context has tokens.
        config.adopt_limits(members, space.alphabet.size, self.contexts.prefixes)
        ends = sorted(space.alphabet.ends)
        for own in (config, self.generation_config):
            own.bos_token_id = own.pad_token_id = space.alphabet.end
            own.eos_token_id = ends if len(ends) > 1 else ends[0]
        self.combiner = space.combiner(config.members)
        self.combiner.crossed = crossing(space.alphabet.words, space.spellings)
        self.tokenizer = space.alphabet.tokenizer

    @property
    def member_heads(self) -> list[Head]:
        """The members' own output layers, each over the member's own tokens, in the members' order."""
        return self._heads

    def own_tokens(self, text: str) -> list[list[int]]:
        """Return for each member the tokens by which it reads a text by itself."""
        return [tokenizer(text, verbose=False)["input_ids"] for tokenizer in self._tokenizers]

    def part(self, chosen: Sequence[int], config: EnsembleConfig) -> EnsembleForCausalLM:
        """Make an ensemble, configured by ``config``, of the members numbered ``chosen``; it shares their weights."""
        members, tokenizers = ([own[k] for k in chosen] for own in (list(self.members), self._tokenizers))
        found = UnionEnsembleForCausalLM(config, members, tokenizers, self.space.part(chosen))
        part: EnsembleForCausalLM = found.eval()
        return part

    def find_heads_again(self) -> None:
        """Take the heads anew from the members' weights; call it after single members were moved or cast."""
        self.forget_readers()
        self._heads = [replace_weight(head, member) for head, member in zip(self._heads, self.members, strict=True)]

    def tokenizer_of(self, i: int) -> PreTrainedTokenizerBase:
        """Return the tokenizer of member i."""
        return self._tokenizers[i]

    def key_of(self, i: int) -> Any:
        """Return what members share if one reader reads for both: the model and how its tokens are spelled."""
        return self.members[i], self.space.key_of(i)

    def new_reader(self, i: int, name: str, kept_tokens: int | None) -> Reader:
        """Make a reader of member i over the union."""
        return self.space.reader(i, super().new_reader(i, name, kept_tokens))

    def before(self, i: int, prompt: Sequence[int], own: Sequence[Sequence[int] | None]) -> tuple[Sequence[int], int]:
        """Return what member i reads of its own at the beginning of a text, and in place of how many of its tokens."""
        return super().before(self.space.prompted_as(i), prompt, own)

    def own_reader(self, i: int) -> Reader:
        """Return the reader of member i over its own tokens."""
        reader: Any = self.readers_of_members[i]
        below: Reader = reader.below
        return below

    def own_spelling(self, i: int) -> Spelling:
        """Return how the tokens of member i are spelled."""
        return self.space.spellings[i]

    def own_prompt(self, text: str, *, special: bool) -> list[list[int] | None]:
        """Return for each member the tokens as which it reads a prompt: its own prompt or prefix, and the text."""
        found = list[list[int] | None]()
        for i, (member, tokenizer) in enumerate(zip(self.contexts.members, self._tokenizers, strict=True)):
            prefix = self.config.prefixes[i] if self.config.prefixes else None
            if prefix is None:
                found.append(ids_of(tokenizer, member.reads(text), special=special))
            else:
                found.append([*prefix, *ids_of(tokenizer, text, special=False)])
        return found

    def require(self, settings: Settings) -> None:
        """Raise the errors of :func:`softmeet.hf.vocabulary.require_for_bytes`, whose reasons hold here, too."""
        require_for_bytes(settings, self.config.vocabulary)
        require_known(settings, self.config.members, self.members)

    def require_tokens(self, what: str) -> None:
        """Raise InvalidInputError, which says that ``what``, such as "evaluation", is for other ensembles."""
        self.require_likelihood(what)

    def require_likelihood(self, what: str) -> None:
        """Raise InvalidInputError, which says that ``what`` is for other ensembles."""
        raise InvalidInputError(
            f"{what} needs a text's likelihood, and over a union of tokens a text can be written in many ways: load "
            "the members with vocabulary='bytes'"
        )
