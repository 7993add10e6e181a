"""Where a summary's words stand in its note: places, neighbors, abbreviations. The ground of every rule."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

from sft.grounding.quantities import UNITS, Quantity, QuantityIndex
from sft.grounding.reading import KIN, MONTHS, Text
from sft.grounding.sentences import SENTENCE_VERSION
from sft.grounding.words import word_set

_MOST_PLACES = 24  # of one word, so that time grows with the length of the texts alone
_REACH = 10  # tokens
_N_NEIGHBORS = 6  # content words on each side
_EQUALS = frozenset("is was are were of : =".split())
_SKIPPED_IN_INITIALS = frozenset("of the and with to in for -".split())
# "2024-02-03", "03.02.24", "02/2024", "on 3/2": the parts that may be a month; not of a date of birth
_DATE = re.compile(
    r"(?i:\b(?:dob|born|birth)\b\W{0,3}(?:on )?[\d/.-]+)"
    r"|\b(?:\d{4}[-/.](\d\d?)|(\d\d?)[-/.](\d\d?)[-/.](?:\d\d){1,2}|(\d\d?)/\d{4}"
    r"|(?<=on )(\d\d?)/(\d\d?)(?! (?:days|nights|weeks)))\b"
)
_PRONOUNS = frozenset("he him his she her hers".split())
_SEXES = {"m": word_set("male"), "f": word_set("female")}

# A heading that ends in a colon, and its list: bullets, or lines of up to three words. It ends at an empty
# line unless these are between all of its items
_ITEM = r"(?:[-•*–·▪>]|\d\d?[.)]\s).*"
_LIST = re.compile(
    rf"^(?P<heading>.*\w) ?:[ \t]*+(?=\n)(?:\s*+{_ITEM}(?:\n[ \t]*+{_ITEM})+|(?:\s*+{_ITEM})+|(?:\n\w[\w-]*+(?: [\w-]++){{0,2}}+$)+)",
    re.MULTILINE,
)


class NotePlaces:
    """A note's words by stem, its word pairs, markers and quantities."""

    def __init__(self, note: str, sentence_version: int = SENTENCE_VERSION):
        self.text = Text(note, sentence_version)
        self.places: dict[str, list[int]] = {}
        for index, word_stem in enumerate(self.text.stems):
            if word_stem:
                self.places.setdefault(word_stem, []).append(index)
        self.words = set(self.text.words)
        self.pairs = set(pairs(self.text, 0, len(self.text.words)))
        self.quantities = QuantityIndex(self.text.quantities)
        self.named = {name_before(self.text, quantity): quantity for quantity in self.text.quantities}
        self.markers = {kind: tuple(zip(*found)) for kind, found in self.text.markers.items()}
        self.values = {(kind, value) for kind, found in self.text.markers.items() for _, value in found}
        parts = {int(part) for match in _DATE.finditer(note) for part in match.groups() if part}
        self.dated = {month for number, month in enumerate(MONTHS, 1) if number in parts}
        self.is_dialogue = bool(re.search(r"\b[Yy]ou\b", note))
        # Right iliac fossa, left eye: abbreviations that may hold a side
        self.may_hold_sides = bool(re.search(r"\b[RL][A-Z]{1,3}\b", note))
        # The words for a man if all that the note has are those for a woman, as in "29F"
        unused = [
            words
            for letter, words in _SEXES.items()
            if words.isdisjoint(self.words) and not re.search(rf"(?i)\b\d\d{letter}\b", note)
        ]
        self.other_sex = unused[0] if len(unused) == 1 else frozenset()
        # In a dialogue "she" is somebody else
        if self.is_dialogue and self.words & (_SEXES["m"] | _SEXES["f"]) <= _PRONOUNS:
            self.other_sex = frozenset()
        # "My mother" is the patient where her daughter speaks
        # Not \W: from each of many empty lines it would look to the end of the last
        self.relative_speaks = bool(
            re.search(rf"(?im)^[^\w\n]*(?:guest|family|{'|'.join(KIN)})\w*\s*:", note)
        )
        # Whole sentences and whole lines
        lines = [
            bisect_left(self.text.spans, (match.start(), 0)) for match in re.finditer(r"^|\Z", note, re.M)
        ]
        below = self._deny_lists(note)
        runs = {self.text.plain(*run): run[0] in below for run in (*self.text.ranges, *pairwise(lines))}
        # "Syncope" below "She denies:" says the opposite if it stands alone
        self.said = {plain for plain, is_below in runs.items() if not is_below}
        self.said_below = runs.keys() - self.said

    def _deny_lists(self, note: str) -> set[int]:
        """Marks the items of lists whose heading denies them, "No evidence of:"; their tokens."""
        below: set[int] = set()
        for match in _LIST.finditer(note):
            colon, end = (bisect_left(self.text.spans, (at, 0)) for at in (match.end("heading"), match.end()))
            if self.text.denied[colon]:
                below.update(range(colon + 1, end))
                self.text.denied[colon + 1 : end] = [True] * (end - colon - 1)
        return below

    def of(self, word_stem: str) -> list[int]:
        """At most _MOST_PLACES token numbers where a stem stands, spread over the note."""
        found = self.places.get(word_stem, [])
        return found[:: len(found) // _MOST_PLACES + 1]

    def has(self, summary: Text, index: int) -> bool:
        """Whether the note holds a word of the summary, or a short form of it."""
        word = summary.words[index]
        if summary.stems[index] in self.places or word in self.words:
            return True
        # "pred" for prednisolone, "gent" for gentamicin; "abdominal" for abdo
        return any(word[:n] in self.words for n in range(3 if len(word) > 6 else 4, min(len(word), 20)))

    def spelled_out(self, summary: Text, first: int, last: int) -> set[int]:
        """The summary's words that spell an abbreviation of the note, two to five letters: TIA, "E K G"."""
        found: set[int] = set()
        indices = [index for index in range(first, last) if summary.words[index] not in _SKIPPED_IN_INITIALS]
        for position in range(len(indices)):
            letters = ""
            for n, index in enumerate(indices[position : position + 5], start=1):
                letters += summary.words[index][0]
                if n > 1 and letters in self.words:
                    found.update(indices[position : position + n])
        return found

    def affinities(self, summary: Text, index: int, places: Sequence[int]) -> dict[int, float]:
        """{number in places: how strongly the words around the summary's word `index` point there}."""
        totals: dict[int, float] = {}
        for weight, word_stem, is_after in _neighbors(summary, index):
            best: dict[int, float] = {}
            found = self.of(word_stem)
            weight /= 1 + 0.15 * len(found)
            for at in found:
                # "left hip": the same order in both counts more
                orders = (1.0, 0.6) if is_after else (0.6, 1.0)
                first, last = bisect_left(places, at - _REACH), bisect_left(places, at + _REACH + 1)
                for number in range(first, last):
                    distance = abs(places[number] - at)
                    score = weight * orders[at < places[number]] / (1 + distance / 3) if distance else 0.0
                    best[number] = max(score, best.get(number, 0.0))
            for number, score in best.items():
                totals[number] = totals.get(number, 0.0) + score
        return totals

    def contest(
        self, summary: Text, index: int, places: Sequence[int], agrees: Callable[[int], bool | None]
    ) -> tuple[float, float, int]:
        """(own, other, number): how strongly the words around the summary's word `index` point to the best of
        the places that agree, and to the best that do not, and which that is; -1 for none."""
        own = other = 0.0
        number = -1
        for at, score in self.affinities(summary, index, places).items():
            is_same = agrees(at)
            if is_same:
                own = max(own, score)
            elif is_same is False and score > other:
                other, number = score, at
        return own, other, number


def name_before(text: Text, quantity: Quantity) -> str:
    """The stem of the word right before a number, or before its "is", "of" or ":"; "" if there is none."""
    index = quantity.index - 1
    index -= text.word(index) in _EQUALS
    is_same = index >= text.ranges[text.sentence_of[quantity.index]][0] and text.words[index] not in UNITS
    return text.stems[index] if is_same else ""


def pairs(text: Text, first: int, last: int) -> list[tuple[str, str]]:
    """Neighboring words, by their stems, punctuation left out."""
    words = [text.stems[i] or text.words[i] for i in range(first, last) if text.words[i][-1].isalnum()]
    return list(pairwise(words))


def _neighbors(text: Text, index: int) -> list[tuple[float, str, bool]]:
    """(weight, stem, whether it follows) of the content words around a word, nearer ones weighing more."""
    first, last = text.ranges[text.sentence_of[index]]
    before = [stem for stem in reversed(text.stems[max(first, index - 40) : index]) if stem]
    after = [stem for stem in text.stems[index + 1 : min(last, index + 41)] if stem]
    return [
        (1 / (1 + rank), stem, is_after)
        for stems, is_after in ((before, False), (after, True))
        for rank, stem in enumerate(stems[:_N_NEIGHBORS])
    ]
