"""GaC as its code has it (Yu et al., 2024, https://github.com/yaoching0/GaC at bbb2567): its keys, reading and ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from softmeet.engine.combine import Combiner
from softmeet.errors import InvalidInputError
from softmeet.members.opaque import NoHead
from softmeet.members.spelling import Spelling
from softmeet.published.keys import KeyAlphabet, cut_each, is_byte_level
from softmeet.readers.reader import Reader
from softmeet.readers.union_reader import UnionReader

# Keys that end a text whatever the members' own ends are.
_ENDS = ("<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|end|>")
# The size of the vocabulary by which Gemma is known, and the token that then stands before a key.
_GEMMA = (256_000, "¢")


class GacMember:
    """A member's tokenizer as GaC's code uses it.

    Args:
        name: the member's, for messages.
        tokenizer: its tokenizer.

    Attributes:
        bytes: the ids of the keys ``<0x00>`` to ``<0xFF>``, or of a byte-level tokenizer to ``<0x7F>``.

    Raises:
        InvalidInputError: if the code stops at this tokenizer.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.tokenizer = name, tokenizer
        self._vocabulary = tokenizer.get_vocab()
        self.is_byte_level = is_byte_level(self._vocabulary)
        self.bytes = self._byte_level_bytes() if self.is_byte_level else self._own_bytes()
        if len(set(self.bytes.values())) < len(self.bytes):
            raise self._refused("two bytes have one token")

    def _refused(self, why: str) -> InvalidInputError:
        return InvalidInputError(
            f"GaC's code cannot take the tokenizer of {self.name}, of which {why}: say vocabulary='union'"
        )

    def _byte_level_bytes(self) -> dict[str, int]:
        found = dict[str, int]()
        for byte in range(128):
            pieces = self.tokenizer.tokenize(chr(byte))
            if not pieces:
                raise self._refused(f"no token spells the byte {byte}")
            found[f"<0x{byte:02X}>"] = self._vocabulary[pieces[0]]
        return found

    def _own_bytes(self) -> dict[str, int]:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        if lacking := [name for name in names if name not in self._vocabulary and name != "<0x09>"]:
            raise self._refused(f"no token is {lacking[0]}")
        return {name: self._vocabulary[name] for name in names if name in self._vocabulary}

    @cached_property
    def strings(self) -> dict[int, str]:
        """The key of each token but those of bytes."""
        taken = set(self.bytes.values())
        left = {token: id_ for token, id_ in self._vocabulary.items() if id_ not in taken}
        # The code counts once more, without the tokens of bytes.
        written = _of_letters if is_byte_level(left) else _spaced
        return {id_: written(token) for token, id_ in left.items()}

    def keys(self, letters: Collection[str] | None) -> dict[int, str]:
        """Return the key of each token.

        Args:
            letters: where there is a member that is not byte-level, all members' strings: then a byte-level one's
                tokens of ASCII letters and digits have these characters as keys, and those of other ASCII characters
                the names of bytes; else None.

        Raises:
            InvalidInputError: if such a character is none of the strings.
        """
        found = dict(self.strings)
        for name, id_ in self.bytes.items():
            letter = chr(int(name[3:5], 16))
            found[id_] = name
            if self.is_byte_level and letters is not None and letter.isascii() and letter.isalnum():
                if letter not in letters:
                    raise self._refused(f"the letter {letter} is a token of no other member")
                found[id_] = letter
        return found

    @cached_property
    def _before(self) -> list[str]:
        """What may stand before a key so that it is cut as in the middle of a text."""
        if self.tokenizer.vocab_size == _GEMMA[0]:
            return [_GEMMA[1], ";"]
        if self.is_byte_level:
            return ["", ";"]
        spaced = [word for word in self._vocabulary if word.startswith("▁") and len(word) > 1]
        all_of_them = "\n".join(spaced)
        for word in sorted(spaced, key=lambda one: (len(one), one[1:])):
            if word.count("▁") == 1 and word[1:].strip() and all_of_them.count(word) == 1:
                return [word[1:], ";"]
        raise self._refused("no token behind a space is part of no other")

    def read_as(self, keys: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids as which keys are read: cut behind another token, which is left out again."""
        found, left = dict[int, tuple[int, ...]](), list[int]()
        for k, key in enumerate(keys):
            if key in self.bytes:
                found[k] = (self.bytes[key],)
            else:
                left.append(k)
        for before in self._before:
            alone = cut_each(self.tokenizer, [before])[0]
            for k, cut in zip(left, cut_each(self.tokenizer, [before + keys[k] for k in left]), strict=True):
                if cut[: len(alone)] == alone and len(cut) > len(alone):
                    found[k] = tuple(cut[len(alone) :])
            left = [k for k in left if k not in found]
        found |= {k: tuple(cut) for k, cut in zip(left, cut_each(self.tokenizer, [keys[k] for k in left]), strict=True)}
        return [found[k] for k in range(len(keys))]


def _of_letters(token: str) -> str:
    return token.replace("Ġ", " ").replace("Ċ", "\n")


def _spaced(token: str) -> str:
    return token.replace("▁", " ") if token.startswith("▁") else token


class GacTokens:
    """The tokens of a member over the keys of all.

    Args:
        member: the member.
        ids: of each symbol that it has, its tokens.
        keys: the keys of all symbols but the last.
        ends: the symbols that end a text.
        start: the ids that it reads before every text.
    """

    def __init__(
        self,
        member: GacMember,
        ids: Mapping[int, tuple[int, ...]],
        keys: Sequence[str],
        ends: frozenset[int],
        start: tuple[int, ...],
    ) -> None:
        self.ids, self.start = ids, start
        self._member, self._keys, self._known = member, keys, dict[int, tuple[int, ...]]()
        end = member.tokenizer.eos_token_id
        self._known |= dict.fromkeys(ends, () if end is None else (end,))

    def read_as(self, symbol: int) -> tuple[int, ...]:
        """Return the ids as which the member reads a symbol."""
        if symbol not in self._known:
            self._known[symbol] = self._member.read_as([self._keys[symbol]])[0]
        return self._known[symbol]


@dataclass(frozen=True, eq=False)
class GacUnion:
    """The union of members' tokens by GaC's keys.

    Attributes:
        alphabet: its symbols.
        keys: the key of each symbol but the last, which stands for ids that are no tokens.
        members: the members.
        symbols: of each member the symbol of each of its tokens.
        spellings: how the tokens of each are spelled.
    """

    alphabet: KeyAlphabet
    keys: Sequence[str]
    members: Sequence[GacMember]
    symbols: Sequence[Mapping[int, int]]
    spellings: Sequence[Spelling]

    @classmethod
    def of(cls, spellings: Sequence[Spelling], tokenizers: Sequence[PreTrainedTokenizerBase]) -> GacUnion:
        """Return the union of the tokens of members that have these tokenizers.

        Raises:
            InvalidInputError: if GaC's code stops at one of them.
        """
        members = [GacMember(one.name, own) for one, own in zip(spellings, tokenizers, strict=True)]
        every = set().union(*(member.strings.values() for member in members))
        one_kind = all(member.is_byte_level for member in members)
        own = [member.keys(None if one_kind else every) for member in members]
        bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
        keys = sorted(bytes_.union(*(some.values() for some in own)))
        numbers = {key: k for k, key in enumerate(keys)}
        symbols = [{token: numbers[key] for token, key in some.items()} for some in own]
        names = {*_ENDS, *(tokenizer.eos_token for tokenizer in tokenizers)}
        ends = frozenset({numbers[name] for name in names if name in numbers} | {len(keys)})
        words = [b"" if k in ends else spellings[0].spelled(ids) for k, ids in enumerate(members[0].read_as(keys))]
        return cls(KeyAlphabet(words, spellings[0], ends, symbols[0]), keys, members, symbols, spellings)

    def key_of(self, i: int) -> Spelling:
        """Return how the member's tokens are spelled."""
        return self.spellings[i]

    def prompted_as(self, i: int) -> int:
        """Return i: every member reads prompts as its own tokenizer cuts them."""
        return i

    def reader(self, i: int, below: Reader) -> UnionReader:
        """Return a reader over the keys of member i, which ``below`` reads over its own tokens."""
        ids = dict[int, list[int]]()
        for token in range(below.alphabet.size):
            ids.setdefault(self.symbols[i].get(token, self.alphabet.end), []).append(token)
        own = {symbol: tuple(some) for symbol, some in ids.items()}
        start = tuple(self.spellings[i].start)
        return UnionReader(below, GacTokens(self.members[i], own, self.keys, self.alphabet.ends, start), self.alphabet)

    def combiner(self, names: Sequence[str]) -> Combiner:
        """Return what combines the members of these names."""
        return Combiner(names, [NoHead(self.alphabet.size) for _ in names])

    def part(self, chosen: Sequence[int]) -> GacUnion:
        """Return the same union of the members numbered ``chosen`` alone."""
        return replace(
            self, members=[self.members[i] for i in chosen], symbols=[self.symbols[i] for i in chosen],
            spellings=[self.spellings[i] for i in chosen],
        )  # fmt: skip
