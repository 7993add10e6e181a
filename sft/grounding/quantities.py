"""Numbers of clinical text: digits, words, ratios, clock times, units, so that equal ones compare equal."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from sft.grounding.words import LEXICON


def _numbers(name: str) -> dict[str, float]:
    """{word: number} of a section of the lexicon."""
    pairs = (pair.split("=") for pair in LEXICON[name].split())
    return {word: float(value) for word, value in pairs}


_WORDS = _numbers("numbers")
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
_MOST = 24  # quantities of one value that are looked at, so that time grows with length alone


@dataclass(slots=True, eq=False)
class Quantity:
    index: int  # of its first token
    last: int  # of its last token
    values: frozenset  # every way to read it
    whole: tuple | None = None  # a ratio, a date, ("clock", minutes): compared as a whole
    unit: tuple | None = None  # (dimension, size)
    is_age: bool = False
    is_implied: bool = False  # "twice", "a week": supports a number, is not checked itself

    def readings(self) -> list:
        """What stands for it where one is compared with another."""
        return [self.whole] if self.whole else list(self.values)


def find_quantities(words: list[str], gaps: list[bool]) -> list[Quantity]:
    """All quantities among the tokens of a text (lower case); gaps[i]: white space stands before token i."""
    quantities: list[Quantity] = []
    index = 0
    while index < len(words):
        word = words[index]
        quantity = None
        if word[-1].isdecimal():
            quantity = _read_digits(words, index, gaps)
        elif (word in _WORDS and word not in ("o", "oh")) or word == "point":
            quantity = _read_words(words, index)
        if quantity is None and word in _IMPLIED:
            quantity = Quantity(index, index, frozenset([_IMPLIED[word]]), is_implied=True)
        index += 1
        if quantity is None:
            continue
        index = quantity.last + 1
        quantity.unit = quantity.unit or _unit_after(words, index)
        quantity.is_age = "old" in words[index : index + 4]
        before, after = (
            words[quantity.index - 1] if quantity.index else ".",
            "".join(words[index : index + 1]),
        )
        # "2." or "2)" at the start of a line or a sentence numbers a list
        is_list = len(word) <= 2 and word.isdecimal() and before in ".,;:(?!" and after in (".", ")")
        if not is_list or index + 1 >= len(words):
            quantities.append(quantity)
    return _join(words, quantities)


def _read_digits(words: list[str], index: int, gaps: list[bool]) -> Quantity:
    word = words[index]
    if ":" in word:
        hour, minute = (int(part) for part in re.findall(r"\d{1,4}", word)[:2])
        # "11:30" may be said "eleven thirty"
        values = frozenset([float(hour * 100 + minute if minute else hour)])
        whole = ("clock", (hour * 60 + minute) % 720) if minute < 60 else (float(hour), float(minute))
        return Quantity(index, index, values, whole)
    if "/" in word:
        parts = tuple(min(_readings(part)) for part in word.split("/"))
        if parts == (1, 2):
            return Quantity(index, index, frozenset([0.5]), is_implied=True)
        # "3/52": three weeks
        if len(parts) == 2 and parts[1] in _SHORTHAND and parts[0] < 43:
            return Quantity(index, index, frozenset(parts[:1]), unit=_SHORTHAND[parts[1]])
        return Quantity(index, index, frozenset(parts), parts)
    # "1 250": a space between thousands
    following = words[index + 1] if index + 1 < len(words) and gaps[index + 1] else ""
    if re.fullmatch(r"\d{1,3} \d{3}", f"{word} {following}"):
        return Quantity(index, index + 1, frozenset(map(float, (word, following, word + following))))
    return Quantity(index, index, frozenset(_readings(word)))


def _readings(digits: str) -> set[float]:
    """ "1,200" -> 1200; "16,2" -> 16.2; "14.200" -> 14.2 or 14200; ".5" -> 0.5."""
    digits = digits[:40]
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", digits):
        return {float(digits.replace(",", ""))}
    parts = re.split(r"[.,:]", digits)
    if len(parts) > 2:
        return {float(part or 0) for part in parts}
    readings = {float(".".join(part or "0" for part in parts))}
    if re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", digits):
        readings.add(float(digits.replace(".", "")))
    return readings


def _read_words(words: list[str], index: int) -> Quantity | None:
    """ "one twenty two" -> 122; "two and a half" -> 2.5; "nineteen ninety two" -> 1992; "six point five"."""
    pieces: list[float] = []
    decimals: str | None = None
    last = index
    for position in range(index, min(len(words), index + 12)):
        word = words[position]
        value = _WORDS.get(word)
        if word == "point" and decimals is None:
            decimals = ""
        elif value is not None and decimals is not None:
            decimals = (
                decimals[:-1] if decimals[-1:] == "0" and len(decimals) > 1 and 0 < value < 10 else decimals
            )
            decimals += f"{value:g}".replace(".", "")
            last = position
        elif value == 0.5 and pieces and words[position - 1] not in ("a", "and"):
            break
        elif value is not None:
            _add_piece(pieces, value)
            last = position
        elif word in _ORDINALS and pieces and pieces[-1] % 10 == 0 < pieces[-1] < 100:
            pieces[-1] += _ORDINALS[word]
            last = position
        elif (
            (
                word == "and"
                and not (pieces and pieces[-1] % 100 == 0)
                and words[position + 1 : position + 2] != ["a"]
            )
            or word not in ("and", "-", "a", "an")
            or position == index
        ):
            break
    if decimals:
        pieces = [float("".join(str(int(piece)) for piece in pieces or [0.0]) + f".{decimals}")]
    if pieces in ([], [1.0]):
        return None
    values = set(pieces)
    if len(pieces) > 1 and all(piece.is_integer() for piece in pieces):
        values.add(float("".join(str(int(piece)) for piece in pieces)))
    return Quantity(index, last, frozenset(values))


def _add_piece(pieces: list[float], value: float) -> None:
    """Adds "two" to "twenty", multiplies "two" by "hundred", begins a new piece otherwise."""
    before = pieces[-1] if pieces else 0.0
    is_ten = before >= 20 and before % 10 == 0 and (before < 100 or before % 100 >= 20) and 0 < value < 10
    if value >= 100 and before:
        pieces[-1] = before * value
    elif value == 0.5 and before:
        pieces[-1] = before * value if before == 12 else before + value
    elif before and (is_ten or (before % 100 == 0 and value < 100)):
        pieces[-1] = before + value
    else:
        pieces.append(value)


def _unit_after(words: list[str], index: int) -> tuple | None:
    while words[index : index + 1] in (["-"], ["–"], ["more"], ["full"]):
        index += 1
    following = words[index : index + 2]
    if not following or "old" in words[index + 1 : index + 3]:
        return None
    # "M G", spelled out in a dialogue
    return (UNITS.get("".join(following)) if len(following[0]) == 1 else None) or UNITS.get(following[0])


def _join(words: list[str], quantities: list[Quantity]) -> list[Quantity]:
    """ "130 over 80" is a ratio; in "5 to 7 days" the 5 has the unit of the 7."""
    for first, second in pairwise(quantities):
        between = words[first.last + 1 : second.index][:3]
        if words[second.index] == "1/2" and between in ([], ["-"]):
            first.values = frozenset(value + 0.5 for value in first.values)
            first.unit = second.unit
        if between in (["over"], ["by"], ["out", "of"]) and not first.whole and not second.whole:
            first.whole = (max(first.values), max(second.values))
            first.values |= second.values
        # "38+4 weeks"
        second.is_implied = second.is_implied or between == ["+"]
        if between in (["to"], ["+"], ["-"], ["–"], ["or"], ["and"]):
            first.unit = first.unit or second.unit
    return quantities


class QuantityIndex:
    """The quantities of a note, to look up those of a summary."""

    def __init__(self, quantities: list[Quantity]):
        self.quantities = quantities
        self.indices = [quantity.index for quantity in quantities]
        self._found: dict[object, list[Quantity]] = {}
        for quantity in quantities:
            keys = [*quantity.values, quantity.whole, *(_size(quantity, value) for value in quantity.values)]
            for key in keys:
                found = self._found.setdefault(key, [])
                if len(found) < _MOST:
                    found.append(quantity)

    def _get(self, *keys) -> list[Quantity]:
        return [quantity for key in keys for quantity in self._found.get(key, ())]

    def matches(self, quantity: Quantity) -> list[Quantity]:
        """The note's quantities that could be this one, whatever their units."""
        whole = quantity.whole
        if whole is None:
            years = [value % 100 for value in quantity.values if 1900 <= value <= 2099]
            return self._get(*quantity.values) + self.converted(quantity) or self._get(*years)
        found = self._get(whole)
        if whole[0] == "clock":
            return found or self._get(*quantity.values)
        if found or 30 <= min(whole) < 1900:
            return found
        # A date or a scale, each part of which may be said in its own way
        parts = [self._get(part, part % 100, 2000 + part, 1900 + part) for part in whole]
        return parts[0] if all(parts) else []

    def converted(self, quantity: Quantity) -> list[Quantity]:
        """The note's quantities of the same size: 1000 mg is 1 g, two weeks are 14 days."""
        sizes = [_size(quantity, value) for value in quantity.values if quantity.unit]
        return self._get(*((dimension, size + near) for dimension, size in sizes for near in (-1, 0, 1)))


def _size(quantity: Quantity, value: float) -> tuple:
    """(dimension, size): equal, within a twentieth or so, for quantities that are the same."""
    if not quantity.unit or value <= 0:
        return ("none", 0)
    return (quantity.unit[0], round(math.log(value * quantity.unit[1]) * 25))
