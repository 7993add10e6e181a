"""Numbers of clinical text: digits, words, ratios, clock times, units, so that equal ones compare equal."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from sft.grounding.words import LEXICON, word_set


def _numbers(name: str) -> dict[str, float]:
    """{word: number} of a section of the lexicon."""
    pairs = (pair.split("=") for pair in LEXICON[name].split())
    return {word: float(value) for word, value in pairs}


_FRACTIONS = {"½": 0.5, "¼": 0.25, "¾": 0.75}
_WORDS = _numbers("numbers") | _FRACTIONS
_ORDINALS = _numbers("ordinals")
_IMPLIED = _numbers("implied") | _ORDINALS
# {name: (dimension, size)}; only units of one dimension can be converted
UNITS = {
    name: (section.removeprefix("unit "), float(group.split("=")[0]))
    for section in LEXICON
    if section.startswith("unit ")
    for group in LEXICON[section].split("|")
    for name in group.split("=")[1].split()
}
_SHORTHAND = {7: UNITS["day"], 52: UNITS["week"], 12: UNITS["month"], 40: UNITS["week"]}
_NO_UNIT = ("", 1.0)
_RATIOS = (["over"], ["by"], ["out", "of"])
_RANGES = (["to"], ["+"], ["-"], ["–"], ["or"], ["and"])
GRADES = word_set("grades")
_GRADE_NUMBERS = frozenset("i ii iii iv one".split())
_MOST = 24  # quantities of one value that are looked at, so that time grows with length alone


@dataclass(slots=True, eq=False)
class Quantity:
    index: int  # of its first token
    last: int  # of its last token
    values: frozenset  # every way to read it: numbers; of a ratio, a date or a clock time, one tuple
    parts: frozenset = frozenset()  # the numbers of a tuple
    unit: tuple = _NO_UNIT  # (dimension, size)
    is_implied: bool = False  # "twice", "a week": supports a number, is not checked itself


def find_quantities(words: list[str]) -> list[Quantity]:
    """All quantities among the tokens of a text (lower case)."""
    quantities: list[Quantity] = []
    index = 0
    while index < len(words):
        word = words[index]
        quantity = None
        if word[-1].isdecimal():
            quantity = _read_digits(words, index)
        elif (word in _WORDS and word not in ("o", "oh")) or word == "point":
            quantity = _read_words(words, index)
        if quantity is None and word in _IMPLIED:
            is_grade = word in _GRADE_NUMBERS and not GRADES.isdisjoint(words[index - 1 : index])
            quantity = Quantity(index, index, frozenset([_IMPLIED[word]]), is_implied=not is_grade)
        if quantity and not _numbers_item(words, index):
            if quantity.unit == _NO_UNIT:
                quantity.unit = _unit_after(words, quantity.last + 1)
            quantities.append(quantity)
        index = quantity.last + 1 if quantity else index + 1
    for first, second in pairwise(quantities):
        between = words[first.last + 1 : second.index][:3]
        if between in _RATIOS and not first.parts and not second.parts:
            first.parts = first.values | second.values
            first.values = frozenset([(max(first.values), max(second.values))])
        # In "5 to 7 days" the 5 has the unit of the 7
        elif between in _RANGES and first.unit == _NO_UNIT:
            first.unit = second.unit
            # "28+3 weeks" of a pregnancy
            if between == ["+"] and second.unit == UNITS["week"]:
                second.unit = UNITS["day"]
    return quantities


def _numbers_item(words: list[str], index: int) -> bool:
    """Whether a list item begins with this token: "2." or "2)" at the start of a line or a sentence."""
    before = words[index - 1] if index else "."
    is_mark = len(words[index]) <= 2 and words[index].isdecimal() and before in ".,;:(?!"
    return is_mark and words[index + 1 : index + 2] in (["."], [")"]) and index + 2 < len(words)


def _read_digits(words: list[str], index: int) -> Quantity:
    word = words[index]
    if ":" in word:
        hour, minute = (int(part[:4]) for part in re.split(r"\D", word)[:2])
        # "11:30" may be said "eleven thirty", "20:00" "8 pm"
        said = frozenset(float(at * 100 + minute if minute else at) for at in (hour, (hour + 12) % 24))
        return Quantity(index, index, frozenset([("clock", (hour * 60 + minute) % 720)]), said)
    parts = tuple(min(_readings(part)) for part in word.split("/"))
    if parts == (1, 2):
        return Quantity(index, index, frozenset([0.5]), is_implied=True)
    # "3/52": three weeks
    if len(parts) == 2 and parts[1] in _SHORTHAND and parts[0] < 43:
        return Quantity(index, index, frozenset(parts[:1]), unit=_SHORTHAND[parts[1]])
    if len(parts) > 1:
        return Quantity(index, index, frozenset([parts]), frozenset(parts))
    # "1 250": a space between thousands
    following = words[index + 1] if index + 1 < len(words) else ""
    if re.fullmatch(r"\d{1,3} \d{3}", f"{word} {following}"):
        return Quantity(index, index + 1, frozenset(map(float, (word, following, word + following))))
    part = _FRACTIONS.get(following, 0.0)
    return Quantity(index, index + bool(part), frozenset(value + part for value in _readings(word)))


def _readings(digits: str) -> set[float]:
    """ "1,200" -> 1200; "16,2" -> 16.2; "14.200" -> 14.2 or 14200; ".5" -> 0.5; of a date, each part."""
    digits = digits[:40]
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", digits):
        return {float(digits.replace(",", ""))}
    parts = [part or "0" for part in re.split(r"[.,]", digits)]
    if len(parts) > 2:
        return {float(part) for part in parts}
    readings = {float(".".join(parts))}
    if re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", digits):
        readings.add(float(digits.replace(".", "")))
    return readings


def _read_words(words: list[str], index: int) -> Quantity | None:
    """ "one twenty two" -> 122; "two and a half" -> 2.5; "nineteen ninety two" -> 1992; "six point five"."""
    pieces: list[float] = []
    point = last = None
    for position in range(index, min(len(words), index + 12)):
        word = words[position]
        value = _WORDS.get(word)
        if value is None and pieces and pieces[-1] % 10 == 0 < pieces[-1] < 100:
            value = _ORDINALS.get(word)
        if word == "point" and point is None:
            point = len(pieces)
        elif value is not None and (value != 0.5 or not pieces or words[position - 1] in ("a", "and")):
            _add_piece(pieces, value, is_new=len(pieces) == point)
            last = position
        elif not pieces or word not in ("-", "a", "an", "and"):
            break
        # "A hundred and five", "two and a half", but not "five and six"
        if word == "and" and pieces[-1] % 100 and words[position + 1 : position + 2] != ["a"]:
            break
    if pieces in ([], [1.0]):
        return None
    values = set(pieces)
    # "A half point two" is no number
    if all(piece.is_integer() for piece in pieces):
        digits = [f"{piece:.0f}" for piece in pieces]
        if point is not None and point < len(pieces):
            values = {float(f"{''.join(digits[:point])}.{''.join(digits[point:])}")}
        else:
            values.add(float("".join(digits)))
    return Quantity(index, last, frozenset(values))


def _add_piece(pieces: list[float], value: float, is_new: bool) -> None:
    """Adds "two" to "twenty", multiplies "two" by "hundred", begins a new piece otherwise."""
    before = pieces[-1] if pieces and not is_new else 0.0
    is_ten = before % 10 == 0 and 0 < value < 10 and (20 <= before < 100 or before % 100 >= 20)
    if before and value >= 100:
        pieces[-1] = before * value
    elif before and (is_ten or value == 0.5 or (before % 100 == 0 and value < 100)):
        pieces[-1] = before + value
    else:
        pieces.append(value)


def _unit_after(words: list[str], index: int) -> tuple:
    if words[index - 1] == "fortnight":
        return UNITS["week"]
    # "Half an hour"
    index += words[index - 1] == "half" and words[index : index + 1] in (["a"], ["an"])
    while words[index : index + 1] in (["-"], ["–"], ["more"], ["full"]):
        index += 1
    following = words[index : index + 3]
    if not following or "old" in following:
        return _NO_UNIT
    # "M G", spelled out in a dialogue
    spelled = UNITS.get("".join(following[:2])) if len(following[0]) == 1 else None
    return spelled or UNITS.get(following[0], _NO_UNIT)


class QuantityIndex:
    """The quantities of a note, to look up those of a summary."""

    def __init__(self, quantities: list[Quantity]):
        self.quantities = quantities
        self.indices = [quantity.index for quantity in quantities]
        self._found: dict[object, list[Quantity]] = {}
        for quantity in quantities:
            for key in (*quantity.values, *quantity.parts, *_sizes(quantity)):
                found = self._found.setdefault(key, [])
                if len(found) < _MOST:
                    found.append(quantity)

    def _get(self, *keys) -> list[Quantity]:
        return [quantity for key in keys for quantity in self._found.get(key, ())]

    def matches(self, quantity: Quantity) -> list[Quantity]:
        """The note's quantities that could be this one, whatever their units."""
        found = self._get(*quantity.values) + self.converted(quantity)
        if found:
            return found
        value = max(quantity.values)
        if not quantity.parts:
            return self._get(value % 100) if 1900 <= value <= 2099 else []
        if value[0] == "clock":
            return self._get(*quantity.parts)
        # A date or a scale, each part of which may be said in its own way; 130/80 is not 80/130
        parts = [self._get(part, part % 100, 2000 + part, 1900 + part) for part in value]
        return parts[0] if all(parts) and not 30 <= min(value) < 1900 else []

    def converted(self, quantity: Quantity) -> list[Quantity]:
        """The note's quantities of the same size: 1000 mg is 1 g, two weeks are 14 days."""
        return self._get(*((name, size + near) for name, size in _sizes(quantity) for near in (-1, 0, 1)))


def _sizes(quantity: Quantity) -> list[tuple[str, int]]:
    """(dimension, size) of each reading: those of quantities that are the same differ by one at most."""
    dimension, size = quantity.unit
    numbers = (quantity.parts or quantity.values) if dimension else ()
    return [(dimension, round(math.log(value * size) * 25)) for value in numbers if value > 0]
