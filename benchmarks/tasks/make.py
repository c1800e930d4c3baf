"""The items of the tasks of generation, from one seed: python benchmarks/tasks/make.py

Writes a file of JSON lines for each kind beside this one; they are committed, and a test makes them again. Functions
are those of functions.txt, where a block is a signature, a docstring, what the function returns behind an equals sign,
something wrong behind an exclamation mark, and what has to be true. An item has an id, a prompt and an answer, and a
function's has its tests. A prompt ends where every tokenizer ends a token: before a space and a word.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Pair = tuple[str, str]

HERE = Path(__file__).parent
SEED, EACH = 1, 10

NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Leon",
         "Mira", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tanja", "Victor")  # fmt: skip
CITIES = ("Oslo", "Lisbon", "Prague", "Vienna", "Dublin", "Geneva", "Athens", "Warsaw", "Turin", "Bergen")
THINGS = ("lamp", "chair", "kettle", "ladder", "mirror", "basket", "blanket", "hammer", "clock", "bucket", "table",
          "bottle", "carpet", "drum", "feather", "helmet", "jacket", "pillow", "wheel", "violin")  # fmt: skip
MONTHS = ("January", "March", "April", "May", "June", "August", "September", "October", "November")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
TITLES = ("The Long Harbour", "A Winter of Bees", "Seven Doors", "The Glass Orchard", "Letters to a Mountain",
          "Salt and Iron", "The Quiet Engine", "Paper Rivers")  # fmt: skip
_CODE = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"


class Draw:
    """Draws that are the same in every version of Python, which promises it of ``Random.random`` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random  # noqa: S311

    def number(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both among them."""
        return low + int(self._random() * (high - low + 1))

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Different items, in a random order."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]

    def one(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.number(0, len(items) - 1)]

    def code(self) -> str:
        """A code such as K7-QX2."""
        letters = "".join(self.one(_CODE) for _ in range(5))
        return f"{letters[:2]}-{letters[2:]}"

    def date(self) -> str:
        """A date such as 4 June."""
        return f"{self.number(1, 28)} {self.one(MONTHS)}"


class Function(NamedTuple):
    """A function of which all is given but what it returns."""

    signature: str
    doc: str
    answer: str
    wrong: str
    tests: list[str]

    @property
    def name(self) -> str:
        return self.signature.partition("(")[0]

    @property
    def prompt(self) -> str:
        return f'def {self.signature}:\n    """{self.doc}"""\n    return'


def functions() -> list[Function]:
    """The functions of functions.txt."""
    found = []
    for block in (HERE / "functions.txt").read_text(encoding="utf-8").split("\n\n"):
        signature, doc, answer, wrong, tests = block.strip("\n").split("\n")
        found.append(Function(signature, doc, answer.removeprefix("= "), wrong.removeprefix("! "), tests.split("; ")))
    return found


def copying(draw: Draw) -> Iterator[tuple[str, Callable[[], Pair]]]:
    """Lists that are copied, as they are or with one change."""

    def codes() -> Pair:
        text = ", ".join(draw.code() for _ in range(5))
        return f"Copy: {text}\nResult:", text

    def sentence() -> Pair:
        (name, other), (a, b, c) = draw.some(NAMES, 2), draw.some(THINGS, 3)
        text = f"{name} put {draw.number(11, 99)} {a}s and the {b} of {other} on a {c} in {draw.one(CITIES)}."
        return f"Copy: {text}\nResult:", text

    def reverse() -> Pair:
        items = draw.some(THINGS, 5)
        return f"Reverse: {', '.join(items)}\nResult:", ", ".join(reversed(items))

    def without() -> Pair:
        items = draw.some(THINGS, 6)
        left_out = items[draw.number(1, 4)]
        rest = ", ".join(item for item in items if item != left_out)
        return f"Leave out {left_out}: {', '.join(items)}\nResult:", rest

    def upper() -> Pair:
        text = ", ".join(draw.some(THINGS, 5))
        return f"In capitals: {text}\nResult:", text.upper()

    yield from {"codes": codes, "sentence": sentence, "reverse": reverse, "without": without, "capitals": upper}.items()


def arithmetic(draw: Draw) -> Iterator[tuple[str, Callable[[], Pair]]]:
    """Sums, differences and products, as formulas or in a sentence."""

    def plus() -> Pair:
        a, b = draw.number(3, 19), draw.number(3, 19)
        return f"{a} + {b} =", str(a + b)

    def minus() -> Pair:
        a, b = draw.number(50, 99), draw.number(11, 49)
        return f"{a} - {b} =", str(a - b)

    def times() -> Pair:
        a, b = draw.number(12, 98), draw.number(3, 9)
        return f"{a} * {b} =", str(a * b)

    def chain() -> Pair:
        a, b, c = draw.number(3, 9), draw.number(3, 9), draw.number(11, 49)
        return f"{a} * {b} + {c} =", str(a * b + c)

    def story() -> Pair:
        name, thing, each, bags = draw.one(NAMES), draw.one(THINGS), draw.number(3, 9), draw.number(3, 9)
        return f"{name} has {bags} boxes with {each} {thing}s each. How many {thing}s is that?", str(bags * each)

    yield from {"plus": plus, "minus": minus, "times": times, "chain": chain, "story": story}.items()


def extraction(draw: Draw) -> Iterator[tuple[str, Callable[[], Pair]]]:
    """Facts that stand in a short text, beside others of the same form."""

    def asked(text: str, answers: dict[str, object]) -> Pair:
        question = draw.one(list(answers))
        return f"Text: {text}\nQuestion: {question}\nAnswer:", str(answers[question])

    def payments() -> Pair:
        names, things, prices = draw.some(NAMES, 4), draw.some(THINGS, 4), draw.some(range(12, 99), 4)
        paid = dict(zip(prices, names, strict=True))
        parts = [f"{who} paid {p} euros for a {it}" for who, p, it in zip(names, prices, things, strict=True)]
        text = f"{', '.join(parts[:-1])} and {parts[-1]}."
        k = draw.number(0, 3)
        return asked(text, {
            "Who paid the most?": paid[max(prices)], "Who paid the least?": paid[min(prices)],
            f"Who bought the {things[k]}?": names[k], f"What did {names[k]} buy?": f"a {things[k]}",
            f"What did the {things[k]} cost?": f"{prices[k]} euros",
        })  # fmt: skip

    def meeting() -> Pair:
        (host, guest, absent), (here, there) = draw.some(NAMES, 3), draw.some(CITIES, 2)
        first, second = draw.some(DAYS, 2)
        room = draw.number(101, 499)
        text = (
            f"{host} moved the meeting in {here} from {first} to {second}, into room {room}. {guest} comes by train "
            f"from {there}, but {absent} cannot come."
        )
        return asked(text, {
            "Who cannot come?": absent, "Who comes by train?": guest, "In which city is the meeting?": here,
            "On which day was the meeting at first?": first, "On which day is the meeting now?": second,
            "From which city does a guest come?": there, "What is the number of the room?": room,
        })  # fmt: skip

    def loan() -> Pair:
        (reader, clerk), (a, b) = draw.some(NAMES, 2), draw.some(TITLES, 2)
        lent, due, card = draw.date(), draw.date(), draw.code()
        text = (
            f'{reader}, card {card}, borrowed "{a}" on {lent} and has to return it by {due}. The library has no copy '
            f'of "{b}", said {clerk}.'
        )
        return asked(text, {
            "What is the number of the card?": card, "Which book was borrowed?": a, "Which book is not there?": b,
            "By what date does the book have to be back?": due, "On what date was the book borrowed?": lent,
        })  # fmt: skip

    def weather() -> Pair:
        (a, b, c), (low, mid, high) = draw.some(CITIES, 3), sorted(draw.some(range(2, 35), 3))
        text = f"At noon it was {mid} degrees in {a}, {high} degrees in {b} and {low} degrees in {c}."
        return asked(text, {
            "Which city was the warmest?": b, "Which city was the coldest?": c,
            f"How warm was it in {a}?": f"{mid} degrees", f"How warm was it in {b}?": f"{high} degrees",
        })  # fmt: skip

    def tickets() -> Pair:
        names, towns = draw.some(NAMES, 2), draw.some(CITIES, 2)
        hours, seats = draw.some(range(7, 22), 2), draw.some(range(20, 98), 2)
        codes, tracks = [draw.code(), draw.code()], draw.some(range(2, 15), 2)
        text = " ".join(
            f"{names[k]}: to {towns[k]} at {hours[k]}:30, platform {tracks[k]}, seat {seats[k]}, booking {codes[k]}."
            for k in (0, 1)
        )
        who = draw.number(0, 1)
        return asked(text, {
            f"What is the number of {names[who]}'s seat?": seats[who], f"Where does {names[who]} go?": towns[who],
            f"What is {names[who]}'s booking code?": codes[who], f"Who has seat {seats[who]}?": names[who],
            f"From which platform number does {names[who]} leave?": tracks[who],
        })  # fmt: skip

    forms = {"payments": payments, "meeting": meeting, "loan": loan, "weather": weather, "tickets": tickets}
    yield from forms.items()


def items() -> dict[str, list[dict[str, object]]]:
    """The items of every kind, by its name."""
    found: dict[str, list[dict[str, object]]] = {
        "functions": [
            {"id": one.name, "prompt": one.prompt, "answer": one.answer, "tests": one.tests} for one in functions()
        ]
    }
    for kind, forms in (("copying", copying), ("arithmetic", arithmetic), ("extraction", extraction)):
        found[kind] = [
            {"id": f"{name}-{k}", **dict(zip(("prompt", "answer"), form(), strict=True))}
            for name, form in forms(Draw(SEED))
            for k in range(EACH)
        ]
    return found


def text_of(lines: Sequence[dict[str, object]]) -> str:
    """Items as lines of JSON."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


if __name__ == "__main__":
    for kind, lines in items().items():
        (HERE / f"{kind}.jsonl").write_text(text_of(lines), encoding="utf-8")
        print(f"{kind}.jsonl: {len(lines)} items")
