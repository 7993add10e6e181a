"""The rules: each compares one kind of statement of a summary with what its note says at that place."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sft.grounding.places import NotePlaces
from sft.grounding.quantities import UNITS, Quantity
from sft.grounding.reading import CONDITIONS, GENERAL_KIN, HEDGES, KIN, NEGATIONS, SELF_NEGATING, SOFT, Text
from sft.grounding.words import is_telling, word_set

# {kind of marker: (kind of finding, weight)}
_MARKERS = {
    **{"side": ("side", 2.0), "kin": ("person", 2.0), "weekday": ("time", 2.0), "order": ("time", 2.0)},
    **dict.fromkeys(("level", "aspect", "front", "reach"), ("side", 1.2)),
    **dict.fromkeys(("when", "shift", "month"), ("time", 1.2)),
    **{"result": ("negation", 1.2), "course": ("misplaced", 1.2)},
}
_DRUG = re.compile(
    r".{3,}(?:olol|pril|sartan|statin|cillin|azole|mycin|micin|floxacin|prazole|tidine|dipine|zepam|zolam|profen|"
    r"triptan|gliptin|gliflozin|formin|parin|xaban|mab|nib|imin|vir|setron|caine|barbital|thiazide|semide|lukast|terol|"
    r"sone|solone|nide|cycline|cef\w+|oxetine|tine|apine|peridone|azine|idone|codone|morphone|tramadol|fentanyl)"
)
_NO_DRUGS = word_set("no drugs")
_FAMILY = frozenset("family families familial paternal maternal side".split())
_MALE = frozenset("he his him man male boy gentleman".split())
_FEMALE = frozenset("she her hers woman female girl lady".split())
_GASES = frozenset("o co spo sao po pco fio hco".split())
_CONDITIONAL = frozenset("for should on".split())
_EQUALS = frozenset("is was are were of : =".split())
_LINKS = frozenset("of the a in - her his".split())


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
    note_sentence: int | None = None  # 1-based
    weight: float = 1.0


@dataclass
class Sentence:
    """One sentence of a summary (tokens first to last - 1) beside the note."""

    note: NotePlaces
    summary: Text
    first: int
    last: int

    def quantities(self) -> list[Quantity]:
        """Those that begin in this sentence."""
        found = self.summary.quantities
        begin, end = (bisect_left(found, at, key=lambda one: one.index) for at in (self.first, self.last))
        return found[begin:end]

    def heads(self, excluded: frozenset | dict) -> Iterator[tuple[int, int]]:
        """(first word, last telling word) of each phrase: content words, cut where a denial begins."""
        text = self.summary
        first = head = None
        for index in range(self.first, self.last + 1):
            word = text.words[index] if index < self.last else "."
            is_content = index < self.last and text.stems[index] != ""
            if first is not None and (
                text.denied[first] != text.denied[index] if is_content else word not in _LINKS
            ):
                if head is not None:
                    yield first, head
                first = head = None
            if is_content:
                first = index if first is None else first
                head = index if is_telling(word) and word not in excluded else head

    def finding(
        self, kind: str, first: int, last: int, weight: float, place: tuple[int, int] | None = None
    ) -> Finding:
        """The summary's tokens first..last; place: the note's tokens that say otherwise."""
        start, end = self.summary.spans[first][0], self.summary.spans[last][1]
        finding = Finding(kind, start, end, self.summary.text[start:end], weight=weight)
        if place is not None:
            text = self.note.text
            finding.note_start, finding.note_end = text.spans[place[0]][0], text.spans[place[1]][1]
            finding.note_says = text.text[finding.note_start : finding.note_end]
            finding.note_sentence = text.sentence_of[place[0]] + 1
        return finding


def marker_findings(sentence: Sentence) -> Iterator[Finding]:
    """Sides, times, relatives, directions: not those that stand at this place in the note."""
    note = sentence.note
    for marker, found in sentence.summary.markers.items():
        kind, weight = _MARKERS[marker]
        places, values = note.markers.get(marker, ((), ()))
        begin, end = (bisect_left(found, (index, "")) for index in (sentence.first, sentence.last))
        for index, value in found[begin:end]:
            if value == "bilateral":
                continue
            scores = note.affinities(sentence.summary, index, places)
            same = max((score for n, score in scores.items() if values[n] == value), default=0.0)
            others = [(score, n) for n, score in scores.items() if values[n] not in (value, "bilateral")]
            lead, number = max(others, default=(0.0, -1))
            place = note.text.with_noun(places[number]) if others else None
            span = sentence.summary.with_noun(index)
            if (marker, value) in note.values:
                factor, margin = (1.0, 0.05) if marker == "side" else (1.3, 0.1)
                if lead > factor * same + margin:
                    yield sentence.finding(kind, *span, 0.8 * weight, place)
            elif any(value in GENERAL_KIN[word] for word in GENERAL_KIN.keys() & note.words):
                continue
            elif lead > 0.15:
                yield sentence.finding(kind, *span, weight, place)
            elif _would_be_there(note, marker):
                yield sentence.finding(kind, *span, 0.7 * weight)


def _would_be_there(note: NotePlaces, marker: str) -> bool:
    """Whether a note would hold such a word at all, if it were true."""
    if marker == "kin":
        return "kin" in note.markers and not note.relative_speaks
    return marker in ("weekday", "month") or (marker == "side" and not note.may_hold_sides)


def quantity_findings(sentence: Sentence) -> Iterator[Finding]:
    """Numbers that the note lacks, has with another unit, or has elsewhere."""
    note, text = sentence.note, sentence.summary
    stated = Counter(key for quantity in sentence.quantities() for key in quantity.readings())
    for quantity in sentence.quantities():
        if quantity.is_implied or _is_no_claim(text, quantity) or _is_cut_off(sentence, quantity):
            continue
        found = note.quantities.matches(quantity)
        is_time = quantity.unit is not None and quantity.unit[0] == "time"
        span = (quantity.index, quantity.last)
        if not found:
            score, rival = max(_rivals(sentence, quantity), key=lambda pair: pair[0], default=(0.0, quantity))
            place = (rival.index, rival.last) if score > 0.2 else None
            yield sentence.finding("time" if is_time else "number", *span, 2.0, place)
            continue
        # The same value with another unit does not count
        agreeing = [other for other in found if not (quantity.unit and (other.unit or other.is_implied))]
        agreeing += note.quantities.converted(quantity)
        if not agreeing:
            place = (found[0].index, min(found[0].last + 1, len(note.text.words) - 1))
            yield sentence.finding("time" if is_time else "unit", *span, 2.0, place)
        elif not quantity.is_age and not any(
            other.is_implied and (other.unit or not quantity.unit) for other in found
        ):
            lead, rival = _lead(sentence, quantity, agreeing, stated)
            if lead > 0.2:
                kind = "time" if is_time else "misplaced"
                yield sentence.finding(kind, *span, min(2.0, 3 * lead), (rival.index, rival.last))


def _lead(
    sentence: Sentence, quantity: Quantity, agreeing: list[Quantity], stated: Counter
) -> tuple[float, Quantity]:
    """(by how much, which): another number of the note stands at this place, or after the same name."""
    note, text = sentence.note.text, sentence.summary
    mine = {id(other) for other in agreeing}
    rivals = _rivals(sentence, quantity)
    own = max((score for score, other in rivals if id(other) in mine), default=0.0)
    rivals = [(score, other) for score, other in rivals if id(other) not in mine]
    name = _name(text, quantity)
    named = [pair for pair in rivals if name and name == _name(note, pair[1])]
    if named and all(_name(note, other) not in ("", name) for other in agreeing):
        return 1.0, max(named, key=lambda pair: pair[0])[1]
    # One that the sentence states as well, as in "5 to 10 days", is no rival
    free = [
        (score, other)
        for score, other in rivals
        if not any(stated[key] > (key in quantity.readings()) for key in other.readings())
    ]
    score, rival = max(free, key=lambda pair: pair[0], default=(0.0, quantity))
    return score - 1.5 * own, rival


def _name(text: Text, quantity: Quantity) -> str:
    """The stem of the word right before a number, or before its "is", "of" or ":"; "" if there is none."""
    index = quantity.index - 1
    index -= text.words[index] in _EQUALS
    is_same = index >= text.ranges[text.sentence_of[quantity.index]][0] and text.words[index] not in UNITS
    return text.stems[index] if is_same else ""


def _is_cut_off(sentence: Sentence, quantity: Quantity) -> bool:
    """Whether the summary ends within a number that the note has after the same word."""
    note, text = sentence.note.text, sentence.summary
    last = len(text.words) - 1
    return 0 < quantity.index == last and any(
        note.words[other.index].startswith(text.words[last])
        and note.words[other.index - 1] == text.words[last - 1]
        for other in note.quantities
        if other.index
    )


def _is_no_claim(text: Text, quantity: Quantity) -> bool:
    """ "Two different things", "no (0)", the 2 of O2."""
    index = quantity.index
    largest = max(quantity.values)
    is_attached = index > 0 and text.spans[index - 1][1] == text.spans[index][0]
    is_count = text.words[index].isalpha() and largest <= 3 and not quantity.unit
    return is_count or largest == 0 or (is_attached and text.words[index - 1] in _GASES)


def _rivals(sentence: Sentence, quantity: Quantity) -> list[tuple[float, Quantity]]:
    """The note's quantities of this sort, with how strongly the words around this one point to them."""
    index = sentence.note.quantities
    found = []
    for number, score in sentence.note.affinities(sentence.summary, quantity.index, index.indices).items():
        other = index.quantities[number]
        is_other_form = other.is_implied or bool(other.whole) != bool(quantity.whole)
        is_other_unit = other.unit and quantity.unit and other.unit[0] != quantity.unit[0]
        if not is_other_form and not is_other_unit:
            # One with the same unit is the likelier counterpart
            found.append((score * (1.3 if quantity.unit and other.unit == quantity.unit else 1.0), other))
    return found


def polarity_findings(sentence: Sentence) -> Iterator[Finding]:
    """Denied in the summary and not in the note, or the other way round; one finding for a phrase."""
    for first, head in sentence.heads(NEGATIONS):
        place, weight = _other_polarity(sentence, head)
        is_heading = sentence.summary.words[head + 1 : head + 2] == [":"]
        if weight and not is_heading:
            note = sentence.note.text
            beginning = note.ranges[note.sentence_of[place]][0]
            yield sentence.finding("negation", first, head, weight, (max(beginning, place - 2), place))


def _other_polarity(sentence: Sentence, head: int) -> tuple[int, float]:
    """(place in the note, weight > 0) if the note denies what the summary affirms, or the other way round."""
    note, text = sentence.note, sentence.summary
    denied = text.denied[head]
    places = note.of(text.stems[head])
    scores = note.affinities(text, head, places) if places else {}
    # The best place of each polarity; None is a question without an answer
    best = {True: (-1.0, -1), False: (-1.0, -1), None: (-1.0, -1)}
    for number, place in enumerate(places):
        polarity = note.text.denied[place]
        best[polarity] = max(best[polarity], (scores.get(number, 0.0), place))
    (own, _), (score, place) = best[denied], best[not denied]
    if denied is None or place < 0 or best[None][0] > score or (own >= 0 and score <= 1.5 * own + 0.3):
        return 0, 0.0
    # The word alone is not enough where it is affirmed, or denied by the answer to a question
    is_question = note.text.words[note.text.ranges[note.text.sentence_of[place]][1] - 1] == "?"
    if score < 0.1 and (denied or is_question) and sentence.last - sentence.first > 8:
        return 0, 0.0
    # What negates without a scope of its own: "unable to", "no" farther away
    negated = _near(note.text, place, NEGATIONS, 10) if denied else _near(text, head, NEGATIONS, 10)
    negating = [_near(note.text, place, SELF_NEGATING, 8), _near(text, head, SELF_NEGATING, 8)]
    if any(at is not None for at in (negated, *negating)):
        return 0, 0.0
    return place, 0.6 if own >= 0 else 1.8


def _near(text: Text, index: int, words: frozenset, reach: int) -> int | None:
    """The nearest of certain words in the clause of a token, or next to it, None if there is none."""
    first, last = text.ranges[text.sentence_of[index]]
    found = [
        at
        for at in range(max(first, index - reach), min(last, index + reach + 1))
        if text.words[at] in words
        and (text.clauses[at] == text.clauses[index] or (words >= SOFT and abs(at - index) < 4))
    ]
    return min(found, key=lambda at: abs(at - index), default=None)


def certainty_findings(sentence: Sentence) -> Iterator[Finding]:
    """What the note calls possible, or ties to a condition, and the summary states. One finding a hedge."""
    note, text = sentence.note, sentence.summary
    hedged: dict[int, list[int]] = {}
    for index in range(sentence.first, sentence.last):
        places = note.of(text.stems[index]) if is_telling(text.words[index]) else []
        if not places or text.words[index] in SOFT:
            continue
        scores = note.affinities(text, index, places)
        best = max(scores, key=scores.get, default=0)
        if scores.get(best, 0) < 0.25 and len(places) > 1:
            continue
        hedge = _near(note.text, places[best], HEDGES, 4)
        condition = _near(note.text, places[best], CONDITIONS, 7)
        if hedge is None and condition is not None and condition > places[best]:
            hedge = condition
        if hedge is not None:
            hedged.setdefault(hedge, []).append(index)
    for hedge, indices in hedged.items():
        soft = SOFT | _CONDITIONAL if note.text.words[hedge] in CONDITIONS else SOFT
        if all(_near(text, index, soft, 8) is None for index in indices):
            yield sentence.finding("certainty", indices[0], indices[-1], 1.7, (hedge, hedge))


def person_findings(sentence: Sentence) -> Iterator[Finding]:
    """A relative's illness given to the patient; "he" for a woman."""
    note, text = sentence.note, sentence.summary
    for first, head in sentence.heads(KIN) if not note.relative_speaks else ():
        places = note.of(text.stems[head])
        beside = text.words[max(sentence.first, head - 10) : min(sentence.last, head + 4)]
        is_family = any(word in KIN or word in GENERAL_KIN or word in _FAMILY for word in beside)
        if places and not is_family and all(note.text.kin[place] for place in places):
            yield sentence.finding("person", first, head, 1.7, (places[0], places[0]))
    if note.is_male is None or text.named_relative < sentence.last:
        return
    wrong = _FEMALE if note.is_male else _MALE
    for index in range(sentence.first, sentence.last):
        if text.words[index] in wrong:
            yield sentence.finding("person", index, index, 1.7)
            return


def drug_findings(sentence: Sentence) -> Iterator[Finding]:
    """Drugs, known by their endings, that the note does not name."""
    words = sentence.summary.words
    for index in range(sentence.first, sentence.last):
        is_drug = _DRUG.fullmatch(words[index]) and is_telling(words[index]) and words[index] not in _NO_DRUGS
        if is_drug and not sentence.note.has(sentence.summary, index):
            yield sentence.finding("drug", index, index, 2.0)


RULES = (
    *(marker_findings, quantity_findings, polarity_findings),
    *(certainty_findings, person_findings, drug_findings),
)
