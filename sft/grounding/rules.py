"""The rules: each compares one kind of statement of a summary's sentence with what its note says at that place."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sft.grounding.places import NotePlaces
from sft.grounding.quantities import Quantity
from sft.grounding.reading import CONDITIONS, GENERAL_KIN, HEDGES, KIN, NEGATIONS, SELF_NEGATING, SOFT, Text
from sft.grounding.words import is_telling

MARKER_KINDS = {
    "side": "side",
    "level": "side",
    "aspect": "side",
    "front": "side",
    "reach": "side",
    "kin": "person",
}
MARKER_KINDS |= {
    "order": "time",
    "when": "time",
    "period": "time",
    "shift": "time",
    "weekday": "time",
    "month": "time",
}
MARKER_KINDS |= {"result": "negation", "change": "misplaced", "course": "misplaced"}
_WEIGHTS = {"side": 2.0, "level": 1.0, "kin": 2.0, "weekday": 2.0, "month": 1.5, "order": 1.0}
_DRUG = re.compile(
    r".{3,}(?:olol|pril|sartan|statin|cillin|azole|mycin|micin|floxacin|prazole|tidine|dipine|zepam|zolam|profen|"
    r"triptan|gliptin|gliflozin|formin|parin|xaban|mab|nib|imin|vir|setron|caine|barbital|thiazide|semide|lukast|terol|"
    r"sone|solone|nide|cycline|cef\w+|oxetine|tine|apine|peridone|azine|idone|codone|morphone|tramadol|fentanyl)"
)
# What a note may call "my dad's brother"
_DISTANT_KIN = frozenset(
    "uncle aunt grandmother grandfather nephew niece cousin grandson granddaughter".split()
)
_MALE = frozenset("he his him man male boy gentleman".split())
_FEMALE = frozenset("she her hers woman female girl lady".split())
_FAMILY = frozenset("family families familial paternal maternal side".split())
_CLASSES = frozenset(
    "cholesterol statin statins triptan heparin-like routine medicine protein vaccine machine nicotine".split()
)


@dataclass
class Finding:
    """What a summary says at start..end, and what its note says instead (None where it has nothing)."""

    kind: str
    start: int
    end: int
    says: str
    note_says: str | None = None
    note_start: int | None = None
    note_end: int | None = None
    weight: float = 1.0


@dataclass
class Sentence:
    """One sentence of a summary (tokens first to last - 1) beside the note."""

    note: NotePlaces
    summary: Text
    first: int
    last: int

    def quantities(self) -> list[Quantity]:
        return self.summary.quantities_of[self.summary.sentence_of[self.first]]

    def finding(
        self, kind: str, first: int, last: int, weight: float, place: tuple[int, int] | None = None
    ) -> Finding:
        """The summary's tokens first..last; place: the note's tokens that say otherwise."""
        start, end = self.summary.spans[first][0], self.summary.spans[last][1]
        says = self.summary.text[start:end]
        if place is None:
            return Finding(kind, start, end, says, weight=weight)
        note_start, note_end = self.note.text.spans[place[0]][0], self.note.text.spans[place[1]][1]
        note_says = self.note.text.text[note_start:note_end]
        return Finding(kind, start, end, says, note_says, note_start, note_end, weight)


def marker_findings(sentence: Sentence) -> Iterator[Finding]:
    """Sides, times, relatives, directions: not those that stand at this place in the note."""
    for kind, found in sentence.summary.markers.items():
        for index, value in found:
            if not sentence.first <= index < sentence.last:
                continue
            note_values = {other for _, other in sentence.note.text.markers.get(kind, [])}
            if kind == "side" and value == "bilateral":
                continue
            votes = sentence.note.votes(sentence.summary, index, kind)
            same = max((score for score, _, other in votes if other == value), default=0.0)
            votes = [vote for vote in votes if vote[2] not in (value, "bilateral")]
            other = max(votes, default=(0.0, 0, ""))
            weight = _WEIGHTS.get(kind, 0.7)
            if value not in note_values:
                general = GENERAL_KIN.keys() & sentence.note.words if kind == "kin" else ()
                if (
                    any(value in GENERAL_KIN[word] for word in general)
                    and other[0] < 0.5
                    or value in _DISTANT_KIN
                ):
                    continue
                if other[0] > 0.15:
                    yield sentence.finding(MARKER_KINDS[kind], index, index, weight, (other[1], other[1]))
                elif _is_needed(sentence, kind):
                    yield sentence.finding(MARKER_KINDS[kind], index, index, weight * 0.7)
            elif other[0] > (1.0 if kind == "side" else 1.3) * same + (0.05 if kind == "side" else 0.1):
                yield sentence.finding(MARKER_KINDS[kind], index, index, weight * 0.8, (other[1], other[1]))


def _is_needed(sentence: Sentence, kind: str) -> bool:
    """Whether a note would hold such a word at all, if it were true."""
    if kind == "side":
        return "side" in sentence.note.text.markers or not sentence.note.has_sides
    is_kin = kind == "kin" and "kin" in sentence.note.text.markers and not sentence.note.relative_speaks
    return is_kin or kind in ("weekday", "month")


def quantity_findings(sentence: Sentence) -> Iterator[Finding]:
    """Numbers that the note lacks, has with another unit, or has elsewhere."""
    note = sentence.note
    for quantity in sentence.quantities():
        if quantity.is_implied:
            continue
        word = sentence.summary.words[quantity.index]
        # Counts in words, as in "two different things", say little; nor does O2 hold a number
        is_count = word.isalpha() and max(quantity.values) <= 3 and not quantity.unit
        if is_count or max(quantity.values) == 0 or _follows_letter(sentence.summary, quantity.index):
            continue
        found = note.quantities.matches(quantity)
        kind = "time" if quantity.unit and quantity.unit[1] == "time" else "number"
        span = (quantity.index, quantity.last)
        scores = _quantity_scores(sentence, quantity)
        if not found:
            rival = max(scores, key=lambda pair: pair[0], default=(0.0, None))
            place = (rival[1].index, rival[1].last) if rival[0] > 0.2 else None
            yield sentence.finding(kind, *span, 2.0, place)
            continue
        # The same value with another unit does not count
        sizes = {id(other) for other in note.quantities.converted(quantity)}
        agreeing = {id(other) for other in found if not (quantity.unit and other.unit) or id(other) in sizes}
        if any(other.is_implied and (other.unit or not quantity.unit) for other in found):
            continue
        own = max((score for score, other in scores if id(other) in agreeing), default=0.0)
        # A rival that the sentence states as well, as in "5 to 10 days", is no rival
        stated = {value for other in sentence.quantities() if other is not quantity for value in other.values}
        others = [pair for pair in scores if id(pair[1]) not in agreeing and not pair[1].values & stated]
        score, rival = max(others, key=lambda pair: pair[0], default=(0.0, None))
        if not agreeing:
            place = (found[0].index, min(found[0].last + 1, len(note.text.words) - 1))
            yield sentence.finding("time" if kind == "time" else "unit", *span, 2.0, place)
        elif score > 1.2 * own + 0.2 and not quantity.is_age:
            weight = min(2.0, 0.4 + score - 1.2 * own)
            yield sentence.finding(
                kind if kind == "time" else "misplaced", *span, weight, (rival.index, rival.last)
            )


def _follows_letter(text: Text, index: int) -> bool:
    attached = index and text.spans[index - 1][1] == text.spans[index][0]
    return bool(attached and text.words[index - 1] in ("o", "co", "spo", "sao", "po", "pco", "fio", "hco"))


def _quantity_scores(sentence: Sentence, quantity: Quantity) -> list[tuple[float, Quantity]]:
    """The note's quantities of this sort, with how strongly the words around this one point to them."""
    quantities = sentence.note.text.quantities
    scores = sentence.note.affinities(sentence.summary, quantity.index, [other.index for other in quantities])
    unit = quantity.unit and quantity.unit[0]
    return [
        # One with the same unit is the likelier counterpart
        (
            score * (1.3 if unit and quantities[n].unit and quantities[n].unit[0] == unit else 1.0),
            quantities[n],
        )
        for n, score in scores.items()
        if _comparable(quantity, quantities[n])
    ]


def _comparable(first: Quantity, second: Quantity) -> bool:
    if (
        second.is_implied
        or bool(first.ratio) != bool(second.ratio)
        or (first.clock is None) != (second.clock is None)
    ):
        return False
    return not (first.unit and second.unit) or first.unit[1] == second.unit[1]


def phrases(sentence: Sentence) -> list[list[int]]:
    """The content words of a sentence, cut at punctuation and where another word's scope begins."""
    found: list[list[int]] = [[]]
    text = sentence.summary
    for index in range(sentence.first, sentence.last):
        if text.stems[index]:
            last = found[-1]
            if last and text.denied[last[-1]] != text.denied[index]:
                found.append([])
            found[-1].append(index)
        elif text.words[index] not in ("of", "the", "a", "in", "-", "her", "his") and found[-1]:
            found.append([])
    return [phrase for phrase in found if phrase]


def polarity_findings(sentence: Sentence) -> Iterator[Finding]:
    """Denied in the summary and not in the note, or the other way round; one finding for a phrase."""
    for phrase in phrases(sentence):
        words = sentence.summary.words
        heads = [index for index in phrase if is_telling(words[index]) and words[index] not in NEGATIONS]
        found = _other_polarity(sentence, heads[-1]) if heads else None
        if found:
            place, weight = found
            yield sentence.finding("negation", phrase[0], heads[-1], weight, (max(0, place - 2), place))


def _other_polarity(sentence: Sentence, head: int) -> tuple[int, float] | None:
    """(place in the note, weight) if the note denies what the summary affirms there, or the other way round."""
    note, text = sentence.note, sentence.summary
    places = note.of(text.stems[head])
    if not places:
        return None
    denied = text.denied[head]
    scores = note.affinities(text, head, places)
    agreeing = [n for n, place in enumerate(places) if note.text.denied[place] in (None, denied)]
    number = max(range(len(places)), key=lambda n: scores.get(n, 0.0))
    best, score = places[number], scores.get(number, 0.0)
    own = max((scores.get(n, 0.0) for n in agreeing), default=0.0)
    if number in agreeing or agreeing and own * 1.5 + 0.3 > score:
        return None
    # What negates without a scope of its own: "unable to", "no" farther away
    if _near(note.text if denied else text, best if denied else head, NEGATIONS) is not None:
        return None
    if (
        _near(note.text, best, SELF_NEGATING, 8) is not None
        or _near(text, head, SELF_NEGATING, 8) is not None
    ):
        return None
    # The word alone is not enough where it is affirmed, or denied by the answer to a question
    is_question = note.text.words[note.text.ranges[note.text.sentence_of[best]][1] - 1] == "?"
    if score < 0.1 and (denied or is_question) and sentence.last - sentence.first > 8:
        return None
    return best, 0.6 if agreeing else 1.2 if score > 0.2 else 0.8


def _near(text: Text, index: int, words: frozenset, reach: int = 10) -> int | None:
    """The nearest of certain words in the sentence of a token, None if there is none."""
    first, last = text.ranges[text.sentence_of[index]]
    found = [
        at
        for at in range(max(first, index - reach), min(last, index + reach + 1))
        if text.clauses[at] == text.clauses[index] or abs(at - index) <= 3 and words is SOFT
        if text.words[at] in words or words is NEGATIONS and text.words[at].endswith("n't")
    ]
    return min(found, key=lambda at: abs(at - index), default=None)


def certainty_findings(sentence: Sentence) -> Iterator[Finding]:
    """What the note calls possible, or ties to a condition, and the summary states; one finding for a hedge."""
    note, text = sentence.note, sentence.summary
    used: dict[int, list[int]] = {}
    for index in range(sentence.first, sentence.last):
        if not is_telling(text.words[index]) or text.words[index] in SOFT:
            continue
        places = note.of(text.stems[index])
        scores = note.affinities(text, index, places)
        best = max(scores, key=scores.get, default=0)
        if not places or scores.get(best, 0) < 0.25 and len(places) > 1:
            continue
        hedge = _near(note.text, places[best], HEDGES, 4)
        condition = _near(note.text, places[best], CONDITIONS, 7)
        if hedge is None and condition is not None and condition > places[best]:
            hedge = condition
        if hedge is not None:
            used.setdefault(hedge, []).append(index)
    for hedge, indices in used.items():
        if all(_near(text, index, SOFT, 8) is None for index in indices):
            yield sentence.finding("certainty", indices[0], indices[-1], 1.6, (hedge, hedge))


def person_findings(sentence: Sentence) -> Iterator[Finding]:
    """A relative's illness given to the patient, or the patient's to a relative."""
    note, text = sentence.note, sentence.summary
    for phrase in phrases(sentence) if not note.relative_speaks else ():
        heads = [i for i in phrase if is_telling(text.words[i]) and text.words[i] not in KIN]
        for head in heads[-1:]:
            places = note.of(text.stems[head])
            if not places or len(places) > 3:
                continue
            holders = {note.text.kin[place] for place in places}
            if not text.kin[head] and "" not in holders and not _kin_before(text, head, sentence.first):
                yield sentence.finding("person", phrase[0], head, 1.4, (places[0], places[0]))


def gender_findings(sentence: Sentence) -> Iterator[Finding]:
    """ "He" for a woman, where no relative was named."""
    text, is_male = sentence.summary, sentence.note.is_male
    if is_male is None or any(word in KIN or word in GENERAL_KIN for word in text.words[: sentence.last]):
        return
    wrong = _FEMALE if is_male else _MALE
    for index in range(sentence.last):
        if text.words[index] in wrong:
            if index < sentence.first:
                return
            yield sentence.finding("person", index, index, 1.5)
            return


def _kin_before(text: Text, index: int, first: int) -> bool:
    return any(
        word in KIN or word in GENERAL_KIN or word in _FAMILY
        for word in text.words[max(first, index - 10) : index + 4]
    )


def drug_findings(
    sentence: Sentence, generic_name: Callable[[str], str | None] | None, note_drugs: set
) -> Iterator[Finding]:
    """Drugs that the note does not name, under this or (with `generic_name`) another name."""
    text = sentence.summary
    for index in range(sentence.first, sentence.last):
        word = text.words[index]
        if not is_telling(word) or word in _CLASSES or len(word) < 5 or sentence.note.has(text, index):
            continue
        name = generic_name(word) if generic_name else word if _DRUG.fullmatch(word) else None
        if name and name not in note_drugs:
            yield sentence.finding("drug", index, index, 2.0)


RULES = (
    gender_findings,
    marker_findings,
    quantity_findings,
    polarity_findings,
    certainty_findings,
    person_findings,
)
