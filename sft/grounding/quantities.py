"""Numbers of clinical text: digits, words, ratios, clock times, units, so that equal ones compare equal."""

import math
import re
from dataclasses import dataclass

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
_SMALL += " seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_SMALL.split())}
_WORDS |= {word: 10 * tens for tens, word in enumerate(_TENS.split(), 2)}
_WORDS |= {
    "hundred": 100,
    "thousand": 1000,
    "half": 0.5,
    "o": 0,
    "oh": 0,
    "dozen": 12,
    "couple": 2,
    "quarter": 0.25,
}
_WORDS |= {word[:-1] + "ies": value for word, value in _WORDS.items() if word.endswith("ty")}
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
)
_ORDINALS += " fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
_ORDINALS = {word: value for value, word in enumerate(_ORDINALS.split(), 1)} | {"thirtieth": 30}
# What a note may say for a number; a summary's own use of these is not a claim to check
_IMPLIED = {
    "once": 1,
    "single": 1,
    "od": 1,
    "qd": 1,
    "daily": 1,
    "both": 2,
    "bd": 2,
    "bid": 2,
    "twins": 2,
    "tid": 3,
}
_IMPLIED |= {"tds": 3, "qid": 4, "qds": 4, "a": 1, "an": 1, "fortnight": 2, "pair": 2} | _ORDINALS
_IMPLIED |= {
    "i": 1,
    "ii": 2,
    "iii": 3,
    "iv": 4,
    "twice": 2,
    "thrice": 3,
    "double": 2,
    "one": 1,
    "bilateral": 2,
}
_IMPLIED |= {
    "teenager": 13,
    "january": 1,
    "february": 2,
    "march": 3,
    "april": 4,
    "may": 5,
    "june": 6,
    "july": 7,
}
_IMPLIED |= {
    "august": 8,
    "september": 9,
    "october": 10,
    "november": 11,
    "december": 12,
    "noon": 12,
    "midnight": 12,
}

# name: (dimension, size); only units of one dimension can be converted
_UNITS = {
    "mcg ug µg μg microgram micrograms": ("mass", 1e-6),
    "mg milligram milligrams mgs": ("mass", 1e-3),
    "g gram grams gm gms": ("mass", 1.0),
    "kg kilo kilos kilogram kilograms kgs": ("mass", 1e3),
    "lb lbs pound pounds": ("mass", 453.6),
    "ml mls cc milliliter milliliters millilitre millilitres": ("volume", 1e-3),
    "l liter liters litre litres": ("volume", 1.0),
    "mm millimeter millimeters millimetre millimetres": ("length", 1e-3),
    "cm centimeter centimeters centimetre centimetres": ("length", 1e-2),
    "inch inches": ("length", 0.0254),
    "feet foot ft": ("length", 0.3048),
    "second seconds sec secs": ("time", 1 / 3600),
    "minute minutes min mins": ("time", 1 / 60),
    "hour hours hr hrs h hourly": ("time", 1.0),
    "day days night nights d": ("time", 24.0),
    "week weeks wk wks weekly": ("time", 168.0),
    "month months mo mos monthly": ("time", 730.5),
    "year years yr yrs annually": ("time", 8766.0),
    "% percent": ("share", 1.0),
    "mmol": ("amount", 1e-3),
    "umol µmol μmol micromol": ("amount", 1e-6),
}
UNITS = {name: (names.split()[0], *size) for names, size in _UNITS.items() for name in names.split()}
_SHORTHAND = {7: "day", 52: "week", 12: "month"}


@dataclass(slots=True)
class Quantity:
    index: int  # of its first token
    last: int  # of its last token
    values: frozenset  # every way to read it
    ratio: tuple | None = None  # 130/80, a date: compared as a whole
    clock: int | None = None  # minutes, morning and evening alike
    unit: tuple | None = None  # (name, dimension, size)
    is_age: bool = False
    is_implied: bool = False  # "twice", "a week": supports a number, is not checked itself


def find_quantities(words: list[str], gaps: list[bool]) -> list[Quantity]:
    """All quantities among the tokens of a text (lower case); gaps[i]: white space stands before token i."""
    quantities = []
    index = 0
    while index < len(words):
        word = words[index]
        quantity = None
        if word[-1].isdigit() and not word[-1].isalpha():
            quantity = _read_digits(words, index, gaps)
        elif word in _WORDS and word not in ("o", "oh", "quarter") or word == "point":
            quantity = _read_words(words, index)
        if quantity is None and word in _IMPLIED:
            quantity = Quantity(
                index, index, frozenset([float(_IMPLIED[word])]), is_implied=not _is_span(words, index)
            )
        if quantity is None:
            index += 1
            continue
        quantity.unit = quantity.unit or _unit_after(words, quantity.last + 1)
        quantity.is_age = "old" in words[quantity.last + 1 : quantity.last + 5]
        if not _is_list_number(words, gaps, quantity):
            quantities.append(quantity)
        index = quantity.last + 1
    return _join(words, quantities)


def _read_digits(words: list[str], index: int, gaps: list[bool]) -> Quantity | None:
    word = words[index]
    if ":" in word:
        hour, minute = (int(part) for part in re.findall(r"\d{1,4}", word)[:2])
        return Quantity(index, index, frozenset([float(hour)]), clock=(hour * 60 + minute) % 720)
    if "/" in word:
        parts = tuple(min(_readings(part)) for part in re.split("[/:]", word) if part)
        if parts == (1.0, 2.0):
            return Quantity(index, index, frozenset([0.5]), is_implied=True)
        quantity = Quantity(index, index, frozenset(parts), ratio=parts)
        if len(parts) == 2 and parts[1] in _SHORTHAND and parts[0] < 30:
            quantity.unit = UNITS[_SHORTHAND[parts[1]]]
            quantity.values = frozenset(parts[:1])
            quantity.ratio = None
        return quantity
    values = _readings(word)
    last = index
    # "1 250": a space between thousands
    while (
        last + 1 < len(words)
        and gaps[last + 1]
        and re.fullmatch(r"\d{3}", words[last + 1])
        and word.isdigit()
    ):
        if len(words[index]) > 3 or last > index + 2:
            break
        last += 1
        values |= {float("".join(words[index : last + 1])), float(words[last])}
    return Quantity(index, last, frozenset(values))


def _readings(digits: str) -> set[float]:
    """ "1,200" -> 1200; "16,2" -> 16.2; "14.200" -> 14.2 or 14200; ".5" -> 0.5."""
    digits = digits[:40]
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", digits):
        return {float(digits.replace(",", ""))}
    parts = re.split(r"[.,]", digits)
    if len(parts) > 2:
        return {float(part or 0) for part in parts}
    readings = {float(f"{parts[0] or 0}.{parts[1] or 0}" if len(parts) == 2 else parts[0])}
    if re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", digits):
        readings.add(float(digits.replace(".", "")))
    return readings


def _read_words(words: list[str], index: int) -> Quantity | None:
    """ "one twenty two" -> 122; "nineteen ninety two" -> 1992; "two and a half" -> 2.5; "six point five" -> 6.5."""
    pieces: list[float] = []
    last = index
    position = index
    while position < len(words) and position < index + 12:
        word = words[position]
        if word in _WORDS:
            _add_piece(pieces, _WORDS[word])
            last = position
        elif word == "point" and position + 1 < len(words) and words[position + 1] in _WORDS:
            last = position = _read_decimals(words, position + 1, pieces)
        elif word in _ORDINALS and pieces and pieces[-1] in (20, 30):
            pieces[-1] += _ORDINALS[word]
            last = position
        elif not (word in ("and", "-", "a", "an") and position > index):
            break
        position += 1
    if pieces in ([], [1]):
        return None
    values = set(pieces)
    whole = [int(piece) for piece in pieces if piece == int(piece)]
    if len(whole) == len(pieces) > 1:
        values.add(float("".join(map(str, whole))))
    return Quantity(index, last, frozenset(map(float, values)))


def _read_decimals(words: list[str], position: int, pieces: list[float]) -> int:
    """Adds what stands after "point" to the last piece; returns the last token read."""
    digits = ""
    while position < len(words) and words[position] in _WORDS and len(digits) < 4:
        value = _WORDS[words[position]]
        if not float(value).is_integer() or value > 99:
            break
        tens = len(digits) == 2 and digits[1] == "0" and 0 < value < 10
        digits = (
            digits[0] + str(value)
            if tens and words[position - 1] not in ("zero", "o", "oh")
            else digits + str(value)
        )
        position += 1
    whole = pieces.pop() if pieces else 0
    pieces.append(float(f"{int(whole)}.{digits or 0}"))
    return position - 1


def _add_piece(pieces: list[float], value: float) -> None:
    before = pieces[-1] if pieces else None
    if before is None:
        pieces.append(value)
    elif value in (100, 1000):
        pieces[-1] = before * value
    elif value < 1 and value:
        pieces[-1] = before * value if before == 12 else before + value
    elif (
        before >= 20
        and before % 10 == 0
        and 0 < value < 10
        or before % 100 == 0
        and before >= 100
        and value < 100
    ):
        pieces[-1] = before + value
    elif before >= 120 and before % 10 == 0 and before % 100 >= 20 and 0 < value < 10:
        pieces[-1] = before + value
    else:
        pieces.append(value)


def _unit_after(words: list[str], index: int) -> tuple | None:
    while index < len(words) and words[index] in ("-", "–", "more", "full", "whole", "½"):
        index += 1
    if index >= len(words):
        return None
    # "M G", spelled out in a dialogue
    unit = UNITS.get("".join(words[index : index + 2])) if len(words[index]) == 1 else None
    unit = unit or UNITS.get(words[index])
    is_age = unit and unit[1] == "time" and "old" in words[index + 1 : index + 3]
    return None if is_age else unit


def _is_span(words: list[str], index: int) -> bool:
    """Whether this "a" is the number of "a week ago", "for a month"."""
    is_time = (
        words[index] in ("a", "an")
        and UNITS.get(words[index + 1] if index + 1 < len(words) else "", "  ")[1] == "time"
    )
    beside = {words[index - 1] if index else "", *words[index + 2 : index + 3]}
    return is_time and bool(beside & {"ago", "later", "earlier", "history", "for", "about", "within", "over"})


def _is_list_number(words: list[str], gaps: list[bool], quantity: Quantity) -> bool:
    """ "2." or "2)" at the start of a line or a sentence."""
    first, following = quantity.index, quantity.last + 1
    before = words[first - 1] if first else "."
    is_short = re.fullmatch(r"\d{1,2}", words[first]) and following < len(words)
    return bool(is_short and words[following] in ".)" and before in ".,;:(?!" and following + 1 < len(words))


def _join(words: list[str], quantities: list[Quantity]) -> list[Quantity]:
    """ "130 over 80" is a ratio; in "5 to 7 days" the 5 has the unit of the 7."""
    for first, second in zip(quantities, quantities[1:]):
        between = words[first.last + 1 : second.index]
        if words[second.index] == "1/2" and between in ([], ["-"]):
            first.values = frozenset(value + 0.5 for value in first.values)
            first.unit = second.unit
        if between in (["over"], ["out", "of"]) and not first.ratio and not second.ratio:
            first.ratio = (max(first.values), max(second.values))
            first.values |= second.values
        if between in (["to"], ["-"], ["–"], ["or"], ["and"]):
            first.unit = first.unit or second.unit
    return quantities


class QuantityIndex:
    """The quantities of a note, to look up those of a summary."""

    def __init__(self, quantities: list[Quantity]):
        self.quantities = quantities
        self.by_value: dict[float, list[Quantity]] = {}
        self.ratios = {quantity.ratio for quantity in quantities if quantity.ratio}
        self.clocks = {quantity.clock for quantity in quantities if quantity.clock is not None}
        self.sizes: dict[str, list[tuple[float, Quantity]]] = {}
        for quantity in quantities:
            for value in quantity.values:
                rounded = {value, float(round(value)), round(value, 1)} if value >= 10 else {value}
                for key in rounded:
                    self.by_value.setdefault(key, []).append(quantity)
                if quantity.unit:
                    size = f"{quantity.unit[1]} {_magnitude(value * quantity.unit[2])}"
                    self.sizes.setdefault(size, []).append(quantity)

    def matches(self, quantity: Quantity) -> list[Quantity]:
        """The note's quantities that could be this one, whatever their units."""
        if quantity.clock is not None and quantity.clock in self.clocks:
            return [other for other in self.quantities if other.clock == quantity.clock][:30]
        if quantity.ratio and not quantity.unit:
            if quantity.ratio in self.ratios or min(quantity.ratio) >= 30:
                return [other for other in self.quantities if other.ratio == quantity.ratio][:30]
            # A date or a scale, each part of which may be said in its own way
            parts = [
                next(filter(None, map(self.by_value.get, (part, part % 100, 2000 + part, 1900 + part))), None)
                for part in quantity.ratio
            ]
            return parts[0][:30] if all(parts) else []
        if quantity.clock is not None:
            minute = quantity.clock % 60
            return self.by_value.get(float(quantity.clock // 60), []) if not minute else []
        found = [other for value in quantity.values for other in self.by_value.get(value, [])[:30]]
        return found + self.converted(quantity) or self._years(quantity)

    def converted(self, quantity: Quantity) -> list[Quantity]:
        """The note's quantities with another unit and the same size: 1000 mg is 1 g, two weeks are 14 days."""
        if not quantity.unit:
            return []
        found = []
        for value in quantity.values:
            magnitude = _magnitude(value * quantity.unit[2])
            for near in (magnitude - 1, magnitude, magnitude + 1):
                found += self.sizes.get(f"{quantity.unit[1]} {near}", [])[:30]
        return found

    def _years(self, quantity: Quantity) -> list[Quantity]:
        """ "ninety five" for 1995."""
        return [
            other
            for value in quantity.values
            if 1900 <= value <= 2099
            for other in self.by_value.get(value % 100, [])[:30]
        ]


def _magnitude(size: float) -> int:
    """Equal, within a twentieth or so, for sizes that are the same."""
    return round(math.log(size) * 25) if size > 0 else 0
