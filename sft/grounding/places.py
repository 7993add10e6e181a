"""Where a summary's words stand in its note: places, neighbors, abbreviations. The ground of every rule."""

import re
from bisect import bisect_left
from itertools import pairwise

from sft.grounding.quantities import QuantityIndex
from sft.grounding.reading import KIN, Text
from sft.grounding.sentences import SENTENCE_VERSION

_MOST_PLACES = 24  # of one word, so that time grows with the length of the texts alone
_REACH = 10  # tokens
_N_NEIGHBORS = 6  # content words on each side
_SKIPPED_IN_INITIALS = frozenset("of the and with to in for -".split())
# Nouns and titles first, pronouns where there are none
_GENDERS = (
    (
        r"\b(?:man|male|boy|gentleman|sir|mr|\d\dm)\b",
        r"\b(?:woman|female|girl|lady|ma'am|miss|m(?:r)?s|\d\df)\b",
    ),
    (r"\b(?:he|his|him)\b", r"\b(?:she|her|hers)\b"),
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
        self.markers = {kind: tuple(zip(*found)) for kind, found in self.text.markers.items()}
        self.values = {(kind, value) for kind, found in self.text.markers.items() for _, value in found}
        self.is_dialogue = bool(re.search(r"\b[Yy]ou\b", note))
        self.is_male = _is_male(note.lower(), self.is_dialogue)
        # "My mother" is the patient where her daughter speaks
        self.relative_speaks = bool(re.search(rf"(?im)^\W*(?:guest|family|{'|'.join(KIN)})\w*\s*:", note))
        # Right iliac fossa, left eye: abbreviations that may hold a side
        self.may_hold_sides = bool(re.search(r"\b[RL][A-Z]{1,3}\b", note)) and "side" not in self.markers

    def of(self, word_stem: str) -> list[int]:
        """At most _MOST_PLACES token numbers where a stem stands, spread over the note."""
        found = self.places.get(word_stem, [])
        return found[:: len(found) // _MOST_PLACES + 1]

    def is_all_denied(self, word_stem: str, denied: bool | None) -> bool:
        """Whether a stem stands in the note, and nowhere as in the summary: denied there, or not."""
        found = self.of(word_stem)
        is_known = denied is not None and bool(found)
        return is_known and all(self.text.denied[place] is (not denied) for place in found)

    def has(self, summary: Text, index: int) -> bool:
        """Whether the note holds a word of the summary, or a short form of it."""
        word = summary.words[index]
        if summary.stems[index] in self.places or word in self.words:
            return True
        # "pred" for prednisolone, "gent" for gentamicin; "abdominal" for abdo
        return any(word[:n] in self.words for n in range(3 if len(word) > 6 else 4, min(len(word), 20)))

    def spelled_out(self, summary: Text, first: int, last: int) -> set[int]:
        """The summary's words that together spell an abbreviation of the note: TIA, COPD."""
        found = _initials(summary, first, last).items()
        return {index for initials, indices in found if initials in self.words for index in indices}

    def affinities(self, summary: Text, index: int, places: list[int] | tuple[int, ...]) -> dict[int, float]:
        """{number in places: how strongly the words around the summary's word `index` point there}."""
        totals: dict[int, float] = {}
        text = self.text
        for weight, word_stem, is_after in _neighbors(summary, index):
            best: dict[int, float] = {}
            found = self.of(word_stem)
            weight /= 1 + 0.15 * len(found)
            for at in found:
                number = bisect_left(places, at - _REACH)
                while number < len(places) and places[number] <= at + _REACH:
                    place = places[number]
                    distance = abs(place - at) + 2 * abs(text.clauses[place] - text.clauses[at])
                    score = weight / (1 + distance / 3) if distance else 0.0
                    if text.sentence_of[place] != text.sentence_of[at]:
                        score *= 0.4
                    # "left hip": the same order in both
                    if (at > place) != is_after:
                        score *= 0.6
                    best[number] = max(score, best.get(number, 0.0))
                    number += 1
            for number, score in best.items():
                totals[number] = totals.get(number, 0.0) + score
        return totals

    def distance(self, first: str, second: str) -> int:
        """The fewest tokens between any two places of two stems."""
        nearest = 10_000
        seconds = self.places.get(second, [])
        for at in self.of(first):
            number = bisect_left(seconds, at)
            for other in seconds[max(0, number - 1) : number + 2]:
                nearest = min(nearest, abs(other - at) if other != at else nearest)
        return 0 if first == second else nearest


def _is_male(note: str, is_dialogue: bool) -> bool | None:
    """Whether the patient is male, by the note's words in lower case; None if they do not tell."""
    # In a dialogue, "he" is somebody else
    for male, female in _GENDERS[: 1 if is_dialogue else 2]:
        is_male, is_female = (bool(re.search(pattern, note)) for pattern in (male, female))
        if is_male or is_female:
            return is_male if is_male != is_female else None
    return None


def pairs(text: Text, first: int, last: int) -> list[tuple[str, str]]:
    """Neighboring words, by their stems, punctuation left out."""
    words = [text.stems[i] or text.words[i] for i in range(first, last) if text.words[i][-1].isalnum()]
    return list(pairwise(words))


def _initials(text: Text, first: int, last: int) -> dict[str, list[int]]:
    """{"copd": [tokens]}: what neighboring words abbreviate to, two to five letters; "E K G" to ekg."""
    found = {}
    indices = [index for index in range(first, last) if text.words[index] not in _SKIPPED_IN_INITIALS]
    for position in range(len(indices)):
        letters = ""
        for index in indices[position : position + 5]:
            if not text.words[index][0].isalpha():
                break
            letters += text.words[index][0]
            found[letters] = indices[position : position + len(letters)]
    return {letters: indices for letters, indices in found.items() if len(letters) > 1}


def _neighbors(text: Text, index: int) -> list[tuple[float, str, bool]]:
    """(weight, stem, whether it follows) of the content words around a word, nearer ones weighing more."""
    found = []
    first, last = text.ranges[text.sentence_of[index]]
    for around in (range(index - 1, max(first, index - 40) - 1, -1), range(index + 1, min(last, index + 41))):
        rank = 0
        for at in around:
            if text.stems[at]:
                crossed = abs(text.clauses[at] - text.clauses[index])
                found.append((1 / (1 + rank + crossed), text.stems[at], at > index))
                rank += 1
                if rank == _N_NEIGHBORS:
                    break
    return found
