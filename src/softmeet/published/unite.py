"""UniTE as its code has it (Yao et al., 2024, https://github.com/starrYYxuan/UniTE at 106a895, ``unite2.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softmeet.engine.combine import Combiner, Hidden
from softmeet.errors import InvalidInputError
from softmeet.members.opaque import NoHead
from softmeet.members.spelling import Spelling
from softmeet.published.keys import KeyAlphabet, cut_each, is_byte_level
from softmeet.published.retokenized import RetokenizedReader, UnionLogitsReader
from softmeet.readers.reader import Reader

# A key, and the first member's token for it.
Symbol = tuple[str, int]


def key_of(token: str) -> str:
    """Return the key that the code has for a token.

    Example:
        >>> key_of("▁king"), key_of("Ċ")
        ('Ġking', '/n')
    """
    return token.replace("▁", "Ġ").replace("<0x0A>", "/n").replace("Ċ", "/n")


class UniteMember:
    """A member's tokenizer as UniTE's code uses it.

    The code knows models by their names. A tokenizer with more tokens that begin with ▁ than with Ġ is used as those of
    the Llama 2 kind are, any other as those of Llama 3 and Qwen 2.

    Args:
        tokenizer: its tokenizer.

    Attributes:
        keys: the key of each token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        self.tokenizer, self.is_byte_level = tokenizer, is_byte_level(vocabulary)
        self.keys = {id_: key_of(token) for token, id_ in vocabulary.items()}
        self._space = vocabulary.get("Ġ" if self.is_byte_level else "▁", 0)
        self._sought = dict[str, int]()

    def sought(self, keys: Iterable[str]) -> dict[str, int]:
        """Return for each key the id whose logit a member has for it that has no such token among its likeliest.

        That is the token of this name, or else the first into which the name is cut: where a tokenizer writes bytes as
        letters, it takes the name for a text in which such letters stand, and the first is the one of another byte.
        """
        keys = list(keys)
        if new := [key for key in keys if key not in self._sought]:
            names = [key if self.is_byte_level else key.replace("Ġ", "▁") for key in new]
            ids = self.tokenizer.convert_tokens_to_ids(names)
            # It takes id 0 for the unknown token, and a token for the unknown that has another id for one of the name.
            known = dict(zip(new, [None if id_ == 0 else id_ for id_ in ids], strict=True))
            left = [(key, name) for key, name in zip(new, names, strict=True) if known[key] is None and name]
            cut = cut_each(self.tokenizer, [name for _, name in left])
            first = {key: (pieces or [0])[0] for (key, _), pieces in zip(left, cut, strict=True)}
            for key in new:
                given = known[key]
                self._sought[key] = first.get(key, self._space) if given is None else given
        return {key: self._sought[key] for key in keys}


class UniteCombiner(Combiner):
    """A combiner over the keys of the k largest logits of each member, made anew at each place.

    A key that is not among a member's own has the logit of :meth:`UniteMember.sought`; but with a byte-level tokenizer
    0, if that token has given a logit already, be it one of the k. Where two keys seek one token, the code takes them
    in the order of a set; here they come in the order of their names. Hidden states are the members' logits over their
    own tokens.

    Args:
        names: as of :class:`Combiner`.
        k: the number of largest logits.
        members: the members.
        symbols: the symbol of each key with the first member's token for it.
        size: the number of symbols.
    """

    joint = True

    def __init__(
        self, names: Sequence[str], k: int, members: Sequence[UniteMember], symbols: Mapping[Symbol, int], size: int
    ) -> None:
        super().__init__(names, [NoHead(size) for _ in names])
        self._k, self._members, self._symbols = k, members, symbols

    def _own_logits(self, hidden: Hidden, *, native: bool = False) -> list[Float[Tensor, "B v"]]:
        """Return each member's logits of the keys, and -inf for all other symbols."""
        found = [own.new_full((len(own), self.v), -torch.inf) for own in hidden]
        for row in range(len(hidden[0])):
            told = self._row([own[row] for own in hidden])
            which = [self._symbols[key, id_] for key, (id_, _) in told[0].items()]
            for out, own in zip(found, told, strict=True):
                out[row, which] = torch.tensor([own[key][1] for key in told[0]], dtype=out.dtype)
        return found

    def _row(self, logits: Sequence[Float[Tensor, " _"]]) -> list[dict[str, tuple[int, float]]]:
        """Return for each member (its token, the logit) of each key."""
        own = list[dict[str, tuple[int, float]]]()
        for member, told in zip(self._members, logits, strict=True):
            most, ids = told.topk(min(self._k, len(told)))
            pairs = zip(ids.tolist(), most.tolist(), strict=True)
            own.append({member.keys[id_]: (id_, logit) for id_, logit in pairs if id_ in member.keys})
        union = {key for some in own for key in some}
        for member, some, told in zip(self._members, own, logits, strict=True):
            taken = {id_ for id_, _ in some.values()}
            for key, id_ in member.sought(sorted(union - some.keys())).items():
                again = member.is_byte_level and id_ in taken
                some[key] = id_, 0.0 if again else told[id_].item()
                taken.add(id_)
        return own


@dataclass(frozen=True, eq=False)
class UniteUnion:
    """The union of the members' likeliest tokens as UniTE's code has it.

    The first member appends its token for the key that is chosen; each other member reads the first one's text, cut
    anew by its own tokenizer. No text ends.

    Attributes:
        alphabet: its symbols.
        k: the number of largest logits of each member.
        members: the members.
        symbols: the symbol of each key with the first member's token for it.
        spellings: how the tokens of each are spelled.
    """

    alphabet: KeyAlphabet
    k: int
    members: Sequence[UniteMember]
    symbols: Mapping[Symbol, int]
    spellings: Sequence[Spelling]

    @classmethod
    def of(cls, spellings: Sequence[Spelling], tokenizers: Sequence[PreTrainedTokenizerBase], k: int) -> UniteUnion:
        """Return the union of members that have these tokenizers."""
        members = [UniteMember(tokenizer) for tokenizer in tokenizers]
        first, names = members[0], {key for member in members for key in member.keys.values()}
        pairs = {*first.sought(names).items(), *((key, token) for token, key in first.keys.items())}
        symbols = {pair: k for k, pair in enumerate(sorted(pairs))}
        of_token = {token: symbols[key, token] for token, key in first.keys.items()}
        words = [spellings[0].spelled([token]) for _, token in symbols]
        alphabet = KeyAlphabet(words, spellings[0], frozenset({len(words)}), of_token)
        return cls(alphabet, k, members, symbols, spellings)

    def key_of(self, i: int) -> tuple[Spelling, bool]:
        """Return how the member's tokens are spelled, and whether it is the first."""
        return self.spellings[i], not i

    def prompted_as(self, i: int) -> int:
        """Return 0: all members read the first one's prompt."""
        return 0

    def reader(self, i: int, below: Reader) -> Reader:
        """Return a reader over the keys of member i, which ``below`` reads over its own tokens."""
        tokens = UniteTokens(self.members[i], self.symbols, tuple(self.spellings[0].start))
        if i:
            texts = self.members[0].tokenizer, self.members[i].tokenizer
            return RetokenizedReader(
                below, tokens, self.alphabet, [id_ for _, id_ in self.symbols], *texts, self.spellings[i].start
            )
        return UnionLogitsReader(below, tokens, self.alphabet)

    def combiner(self, names: Sequence[str]) -> Combiner:
        """Return what combines the members of these names."""
        return UniteCombiner(names, self.k, self.members, self.symbols, self.alphabet.size)

    def part(self, chosen: Sequence[int]) -> UniteUnion:
        """Return the same union of the members numbered ``chosen`` alone, of which the first has to be.

        Raises:
            InvalidInputError: if it is not.
        """
        if list(chosen[:1]) != [0]:
            raise InvalidInputError(
                f"by UniTE's code every member reads the first one's text, got members {list(chosen)} of which the "
                "first is not 0: say vocabulary='union:k=10'"
            )
        return replace(self, members=[self.members[i] for i in chosen], spellings=[self.spellings[i] for i in chosen])


class UniteTokens:
    """The tokens of a member over keys: what it predicts of a key, and, of the first member, what it reads.

    Args:
        member: the member.
        symbols: the symbol of each key with the first member's token for it.
        start: the ids that the first member reads before every text.
    """

    def __init__(self, member: UniteMember, symbols: Mapping[Symbol, int], start: tuple[int, ...]) -> None:
        of_key, ids = dict[str, list[int]](), dict[int, tuple[int, ...]]()
        for token, key in member.keys.items():
            of_key.setdefault(key, []).append(token)
        for (key, _), symbol in symbols.items():
            if own := of_key.pop(key, None):
                ids[symbol] = tuple(own)
        self.ids: Mapping[int, tuple[int, ...]] = ids
        self.start, self._tokens = start, [id_ for _, id_ in symbols]

    def read_as(self, symbol: int) -> tuple[int, ...]:
        """Return the first member's token for a symbol; none for the end."""
        return (self._tokens[symbol],) if symbol < len(self._tokens) else ()
