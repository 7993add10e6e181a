"""Where a summary's words stand in its note: places, neighbors, abbreviations. The ground of every rule."""

import re
from bisect import bisect_left

from sft.grounding.quantities import QuantityIndex
from sft.grounding.reading import KIN, Text

MOST_PLACES = 24  # of one word, so that time grows with the length of the texts alone
_REACH = 10  # tokens
_N_NEIGHBORS = 6  # content words on each side
# Nouns and titles first, pronouns where there are none
_GENDERS = [
    (re.compile(r"\b(?:[Mm]an|[Mm]ale|[Bb]oy|[Gg]entleman|[Ss]ir|Mr|\d{1,3} ?M)\b"),
     re.compile(r"\b(?:[Ww]oman|[Ff]emale|[Gg]irl|[Ll]ady|[Mm]a'am|[Mm]iss|Mrs|Ms|\d{1,3} ?F)\b")),
    (re.compile(r"\b(?:he|his|him)\b", re.IGNORECASE), re.compile(r"\b(?:she|her|hers)\b", re.IGNORECASE)),
]  # fmt: skip
_SKIPPED_IN_INITIALS = frozenset("of the and with to in for".split())


class NotePlaces:
    """A note's words by stem, its word pairs, abbreviations and quantities."""

    def __init__(self, note: str):
        self.text = Text(note)
        self.places: dict[str, list[int]] = {}
        for index, word_stem in enumerate(self.text.stems):
            if word_stem:
                self.places.setdefault(word_stem, []).append(index)
        self.words = set(self.text.words)
        self.pairs = set(pairs(self.text, 0, len(self.text.words)))
        self.quantities = QuantityIndex(self.text.quantities)
        self.initials = set(_initials(self.text, 0, len(self.text.words)))
        self.is_male = _is_male(note)
        # "My mother" is the patient where her daughter speaks
        self.relative_speaks = bool(re.search(rf"(?im)^\W*(?:guest|family|{'|'.join(KIN)})\w*\s*:", note))
        # Right iliac fossa, left eye: abbreviations that may hold a side
        self.has_sides = bool(self.text.markers.get("side") or re.search(r"\b[RL][A-Z]{1,3}\b", note))
        self._markers = {
            kind: ([place for place, _ in found], [value for _, value in found])
            for kind, found in self.text.markers.items()
        }

    def of(self, word_stem: str) -> list[int]:
        """At most MOST_PLACES token numbers where a stem stands, spread over the note."""
        found = self.places.get(word_stem, [])
        return found[:: -(-len(found) // MOST_PLACES)] if found else found

    def has(self, summary: Text, index: int) -> bool:
        """Whether the note holds a word of the summary, or a shorter or spelled-out form of it."""
        word = summary.words[index]
        if summary.stems[index] in self.places or word in self.words or word in self.initials:
            return True
        # "pred" for prednisolone, "gent" for gentamicin; "abdominal" for abdo
        if any(word[:length] in self.words for length in range(3 if len(word) > 6 else 4, len(word))):
            return True
        return False

    def spelled_out(self, summary: Text, first: int, last: int) -> set[int]:
        """The summary's words that together spell an abbreviation of the note: TIA, COPD."""
        found = set()
        for initials, indices in _initials(summary, first, last).items():
            if initials in self.words:
                found.update(indices)
        return found

    def votes(self, summary: Text, index: int, kind: str) -> list[tuple[float, int, str]]:
        """(score, token, value) of the note's markers of a kind to which the words around a summary's word point."""
        places, values = self._markers.get(kind, ([], []))
        scores = self.affinities(summary, index, places)
        return [(score, places[number], values[number]) for number, score in scores.items()]

    def affinities(self, summary: Text, index: int, places: list[int]) -> dict[int, float]:
        """{number in places: how strongly the words around the summary's word `index` point there}."""
        totals: dict[int, float] = {}
        sentence_of, clauses = self.text.sentence_of, self.text.clauses
        for weight, word_stem, is_after in _neighbors(summary, index):
            best: dict[int, float] = {}
            found = self.of(word_stem)
            weight /= 1 + 0.15 * len(found)
            for at in found:
                number = bisect_left(places, at - _REACH)
                while number < len(places) and places[number] <= at + _REACH:
                    place = places[number]
                    distance = abs(place - at) + 2 * abs(clauses[place] - clauses[at])
                    score = weight / (1 + distance / 3)
                    if sentence_of[place] != sentence_of[at]:
                        score *= 0.4
                    # "left hip": the same order in both
                    if (at > place) != is_after:
                        score *= 0.6
                    if place != at and score > best.get(number, 0):
                        best[number] = score
                    number += 1
            for number, score in best.items():
                totals[number] = totals.get(number, 0) + score
        return totals

    def distance(self, first: str, second: str) -> int:
        """The fewest tokens between any two places of two stems."""
        nearest = 10_000
        seconds = self.places.get(second, [])
        for at in self.of(first):
            number = bisect_left(seconds, at)
            for other in seconds[max(0, number - 1) : number + 2]:
                if other != at or first == second:
                    nearest = min(nearest, abs(other - at))
        return nearest


def _is_male(note: str) -> bool | None:
    """Whether the patient is male, by the note's words; None if they do not tell."""
    # In a dialogue, "he" is somebody else
    for male, female in _GENDERS[: 1 if re.search(r"\byou\b", note) else 2]:
        is_male, is_female = bool(male.search(note)), bool(female.search(note))
        if is_male or is_female:
            return is_male if is_male != is_female else None
    return None


def pairs(text: Text, first: int, last: int) -> list[tuple[str, str]]:
    """Neighboring words, punctuation left out."""
    words = [
        text.stems[i] or text.words[i] for i in range(first, last) if text.words[i].isalnum() or text.stems[i]
    ]
    return list(zip(words, words[1:]))


def _initials(text: Text, first: int, last: int) -> dict[str, list[int]]:
    """{"copd": [tokens]}: what neighboring words abbreviate to, two to five letters; "E K G" to ekg."""
    found = {}
    indices = [
        i for i in range(first, last) if text.words[i] not in _SKIPPED_IN_INITIALS and text.words[i] != "-"
    ]
    for position in range(len(indices)):
        letters = ""
        for index in indices[position : position + 5]:
            if not text.words[index][0].isalpha():
                break
            letters += text.words[index][0]
            if len(letters) > 1:
                found[letters] = indices[position : position + len(letters)]
    return found


def _neighbors(text: Text, index: int) -> list[tuple[float, str, bool]]:
    """(weight, stem, whether it follows) of the content words around a word, in its sentence, nearer ones weighing more."""
    found = []
    for step in (-1, 1):
        rank = 0
        at = index + step
        while (
            0 <= at < len(text.words)
            and rank < _N_NEIGHBORS
            and text.sentence_of[at] == text.sentence_of[index]
        ):
            if abs(at - index) > 40:
                break
            if text.stems[at]:
                crossed = abs(text.clauses[at] - text.clauses[index])
                found.append((1 / (1 + rank + crossed), text.stems[at], step > 0))
                rank += 1
            at += step
    return found
