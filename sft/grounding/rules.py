"""The rules: each compares one kind of statement of a summary with what its note says at that place."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from sft.grounding.places import NotePlaces, name_before
from sft.grounding.quantities import GRADES, Quantity
from sft.grounding.reading import CONDITIONS, GENERAL_KIN, HEDGES, KIN, NEGATIONS, Text
from sft.grounding.words import is_telling, word_set

WEIGHT = 1.7  # of a finding that by itself flags a sentence
_LEAD = 0.3  # by which another place must be the likelier one
# {kind of marker: kind of finding}; opposites are "misplaced"
_MARKERS = {
    "kin": "person",
    **dict.fromkeys(("side", "level", "aspect", "front", "reach"), "side"),
}
_MARKERS |= dict.fromkeys(("weekday", "order", "when", "shift", "month"), "time")
_DRUG_ENDINGS = tuple(word_set("drug endings"))
_NO_DRUGS = word_set("no drugs")
# What is still to come in a note; a summary may say it in these and more words
_COMING = frozenset("to will should if unless".split())
_AHEAD = _COMING.union(
    "once when until being for await awaits awaiting planned plan may might can could would not".split()
)
_DONE = frozenset("performed done completed undertaken carried".split())
_PLANNED = frozenset("will planned scheduled booked tomorrow awaited".split())
_SOFT = word_set("soft") | HEDGES | CONDITIONS
_SELF_NEGATING = word_set("self-negating")
_RELATIVES = frozenset("family families familial paternal maternal side".split()) | GENERAL_KIN | set(KIN)


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

    def is_quoted(self) -> bool:
        """Whether the note says this as a whole sentence or line, perhaps under a heading of its own."""
        words, note, plain = self.summary.words[self.first : self.last], self.note, self.summary.plain
        colon = words.index(":") if ":" in words else 0
        is_line = colon > 0 and plain(self.first, self.first + colon) in note.said
        is_heading = is_line or (0 < colon < 6 and note.words.issuperset(words[:6]))
        items = plain(self.first + (colon + 1 if is_heading else 0), self.last)
        known = note.said | note.said_below if is_line else note.said
        # "She denies: chest pain; syncope"
        return not known.isdisjoint((plain(self.first, self.last), items)) or known.issuperset(
            items.split(" ; ")
        )

    def quantities(self) -> list[Quantity]:
        """Those that begin in this sentence."""
        found = self.summary.quantities
        begin, end = (bisect_left(found, at, key=lambda one: one.index) for at in (self.first, self.last))
        return found[begin:end]

    def phrases(self) -> Iterator[tuple[int, int]]:
        """(first word, last telling word) of each phrase: content words in a row."""
        text = self.summary
        indices = [index for index in range(self.first, self.last) if text.stems[index]]
        for _, group in groupby(indices, key=text.phrases.__getitem__):
            phrase = list(group)
            telling = [index for index in phrase if is_telling(text.words[index])]
            if telling:
                yield phrase[0], telling[-1]

    def finding(
        self, kind: str, first: int, last: int, place: tuple[int, int] | None = None, weight: float = WEIGHT
    ) -> Finding:
        """The summary's tokens first..last; place: the note's tokens that say otherwise."""
        start, end = self.summary.spans[first][0], self.summary.spans[last][1]
        finding = Finding(kind, start, end, self.summary.text[start:end], weight=weight)
        if place is not None:
            text = self.note.text
            finding.note_start, finding.note_end = (
                text.spans[place[0]][0],
                text.spans[min(place[1], len(text.spans) - 1)][1],
            )
            finding.note_says = text.text[finding.note_start : finding.note_end]
            finding.note_sentence = text.sentence_of[place[0]] + 1
        return finding


def marker_findings(sentence: Sentence) -> Iterator[Finding]:
    """Sides, times, relatives, directions: not those that stand at this place in the note."""
    note, text = sentence.note, sentence.summary
    for marker, found in text.markers.items():
        places, values = note.markers.get(marker, ((), ()))
        # Whether a note would hold such a word at all, if it were true
        is_missed = marker in ("weekday", "month") or (marker == "side" and not note.may_hold_sides)
        is_missed |= marker == "kin" and bool(places) and not note.relative_speaks
        begin, end = (bisect_left(found, (index, "")) for index in (sentence.first, sentence.last))
        # Of "raised in May, reduced now" neither speaks against the other
        stated = {value for _, value in found[begin:end] if marker.startswith("opposite")}
        # What is not started has not started
        is_any = marker != "course" or any(text.denied[sentence.first : sentence.last])
        # "Not started" is "withheld", "no malignancy" is "benign"; what is not large need not be small
        is_either = marker in ("course", "opposite benign")
        for index, value in found[begin:end]:

            def agrees(number: int, value: str = value) -> bool | None:
                is_denied = note.text.denied[places[number]]  # noqa: B023
                if values[number] in (value, "bilateral"):  # noqa: B023
                    return is_any or not is_denied  # noqa: B023
                return None if values[number] in stated or (is_either and is_denied) else False  # noqa: B023

            own, lead, number = note.contest(text, index, places, agrees)
            is_other = (
                lead > 1.1 * own + 0.05 if (marker, value) in note.values else lead > _LEAD or is_missed
            )
            if is_other and value != "bilateral" and value not in note.dated:
                place = _with_noun(note.text, places[number]) if number >= 0 else None
                yield sentence.finding(_MARKERS.get(marker, "misplaced"), *_with_noun(text, index), place)


def _with_noun(text: Text, index: int) -> tuple[int, int]:
    """(a token, the word after it if that carries meaning): "left", "knee"."""
    return index, index + any(text.stems[index + 1 : index + 2])


def quantity_findings(sentence: Sentence) -> Iterator[Finding]:
    """Numbers that the note lacks, has with another unit, or has elsewhere."""
    note = sentence.note
    stated = Counter(key for quantity in sentence.quantities() for key in quantity.values)
    for quantity in sentence.quantities():
        if quantity.is_implied or _is_no_claim(sentence, quantity):
            continue
        found = note.quantities.matches(quantity)
        # The same value with another unit does not count
        agreeing = [
            other for other in found if not (quantity.unit[0] and (other.unit[0] or other.is_implied))
        ]
        agreeing += note.quantities.converted(quantity)
        lead, rival = _lead(sentence, quantity, agreeing, stated)
        if agreeing and lead < _LEAD:
            continue
        kind = "misplaced" if agreeing else "unit" if found else "number"
        rival = found[0] if kind == "unit" else rival if agreeing or lead > _LEAD else None
        place = (rival.index, rival.last + (kind == "unit")) if rival else None
        kind = "time" if quantity.unit[0] == "time" else kind
        yield sentence.finding(kind, quantity.index, quantity.last, place)


def _lead(
    sentence: Sentence, quantity: Quantity, agreeing: list[Quantity], stated: Counter
) -> tuple[float, Quantity | None]:
    """(by how much, which): another number of the note stands at this place, or after the same name."""
    note, text = sentence.note, sentence.summary
    name = name_before(text, quantity)
    named = note.named.get(name) if name and agreeing else None
    names = {name_before(note.text, other) for other in agreeing}
    if named and named.unit[0] == quantity.unit[0] and names.isdisjoint(("", name)):
        return 1.0, named

    def agrees(number: int) -> bool | None:
        other = note.quantities.quantities[number]
        is_other_kind = other.is_implied or bool(other.parts) != bool(quantity.parts)
        # One that the sentence states as well, as in "5 to 10 days", is no rival
        is_stated = any(stated[key] > (key in quantity.values) for key in other.values)
        is_rival = not is_other_kind and other.unit[0] == quantity.unit[0] and not is_stated
        return True if other in agreeing else False if is_rival else None

    own, lead, number = note.contest(text, quantity.index, note.quantities.indices, agrees)
    return lead - 1.5 * own, note.quantities.quantities[number] if number >= 0 else None


def _is_no_claim(sentence: Sentence, quantity: Quantity) -> bool:
    """ "Two different things", "no (0)", the 2 of O2, a number within which the summary ends."""
    text = sentence.summary
    index = quantity.index
    largest = max(quantity.parts or quantity.values)
    is_attached = text.word(index - 1).isalpha() and text.spans[index - 1][1] == text.spans[index][0]
    is_count = largest <= 3 and not quantity.unit[0] and (text.words[index].isalpha() or is_attached)
    is_last = index == len(text.words) - 1
    return (
        (is_count and text.word(index - 1) not in GRADES)
        or largest == 0
        or (is_last and any(w.startswith(text.words[index]) for w in sentence.note.words))
    )


def direction_findings(sentence: Sentence) -> Iterator[Finding]:
    """ "From 88 to 210" where the note has "210 to 88", or "88, down from 210"."""
    text, known = sentence.summary, sentence.note.pairs
    steps = [
        (index, text.words[index], text.stems[index + 1] or text.words[index + 1])
        for index in range(sentence.first, sentence.last - 1)
        if text.words[index] in ("from", "to")
    ]
    for (first, one, start), (last, other, end) in pairwise(steps):
        is_reverse = not known.isdisjoint((("to", start), ("from", end), (end, start)))
        if one == "from" and other == "to" and is_reverse and not {("from", start), ("to", end)} & known:
            yield sentence.finding("misplaced", first, last + 1)


def polarity_findings(sentence: Sentence) -> Iterator[Finding]:
    """Denied in the summary and not in the note, or the other way round; one finding for a phrase."""
    note, text = sentence.note, sentence.summary
    for first, head in sentence.phrases():
        places = note.of(text.stems[head])
        # None is a question without an answer
        agrees = [note.text.denied[place] in (text.denied[head], None) for place in places]
        if text.denied[head] is None or not places or text.words[head] in NEGATIONS:
            continue
        own, other, number = note.contest(text, head, places, agrees.__getitem__)
        if all(agrees) or (any(agrees) and other <= 1.5 * own + 0.3):
            continue
        place = places[max(number, 0)]
        start, end = note.text.ranges[note.text.sentence_of[place]]
        # In a long sentence, the word alone is not enough where it is affirmed, or denied by an answer
        is_long = sentence.last - sentence.first > 8
        if is_long and other < 0.3 and (text.denied[head] or note.text.words[end - 1] == "?"):
            continue
        # What negates without a scope of its own: "unable to", "no" farther away
        sides = [(note.text, place), (text, head)]
        affirmed = sides[0 if text.denied[head] else 1]
        negating = [affirmed[0].near(affirmed[1], NEGATIONS, 10)]
        negating += [side.near(at, _SELF_NEGATING, 8) for side, at in sides]
        if all(at is None for at in negating):
            yield sentence.finding("negation", first, head, (max(start, place - 2), place))


def certainty_findings(sentence: Sentence) -> Iterator[Finding]:
    """What the note calls possible, or ties to a condition, and the summary states. One finding a hedge."""
    note, text = sentence.note, sentence.summary
    seen: set[int | None] = {None}
    for index in range(sentence.first, sentence.last):
        places = note.of(text.stems[index]) if is_telling(text.words[index]) else []
        if not places:
            continue
        scores = note.affinities(text, index, places)
        best = max(scores, key=scores.get, default=0)
        condition = note.text.near(places[best], CONDITIONS, 7)
        hedge = note.text.near(places[best], HEDGES, 4)
        # "Concern for sepsis" and "rule out sepsis" are doubts, the patient's own concern is none
        word = note.text.words[hedge] if hedge is not None else ""
        goes_on = "for" if word.startswith("concern") else "out" if word == "rule" else ""
        if goes_on and note.text.word(hedge + 1) != goes_on:
            hedge = None
        if hedge is None and condition is not None and condition > places[best]:
            hedge = condition
        if hedge not in seen and text.near(index, _SOFT, 11) is None:
            yield sentence.finding("certainty", index, index, (hedge, hedge))
        seen.add(hedge)


def plan_findings(sentence: Sentence) -> Iterator[Finding]:
    """What the note has still to come, told as done: "to assess", "will start", "if it rises"."""
    note, text = sentence.note, sentence.summary
    if note.is_dialogue or not _AHEAD.isdisjoint(text.words[sentence.first : sentence.last]):
        return
    for index in range(sentence.first, sentence.last):
        places = note.of(text.stems[index]) if text.words[index].endswith("ed") else []
        ahead = [
            place for place in places if not _COMING.isdisjoint(note.text.words[max(0, place - 2) : place])
        ]
        # "The scan was performed" of "Scan planned"
        if text.words[index] in _DONE and text.word(index - 1) in ("was", "were"):
            places = note.of(text.stems[max(0, index - 2)])
            ahead = [place for place in places if (note.text.near(place, _PLANNED, 5) or 0) > place]
        if ahead and len(ahead) == len(places):
            yield sentence.finding("certainty", index, index, (max(0, ahead[0] - 1), ahead[0]))


def person_findings(sentence: Sentence) -> Iterator[Finding]:
    """A relative's illness given to the patient; "he" for a woman, unless a relative was named before."""
    note, text = sentence.note, sentence.summary
    for first, head in sentence.phrases() if not note.relative_speaks else ():
        places = note.of(text.stems[head])
        beside = text.words[max(sentence.first, head - 10) : min(sentence.last, head + 8)]
        if places and _RELATIVES.isdisjoint(beside) and all(note.text.kin[place] for place in places):
            yield sentence.finding("person", first, head, (places[0], places[0]))
    for index in range(sentence.first, min(sentence.last, text.named_relative)):
        if text.words[index] in note.other_sex:
            yield sentence.finding("person", index, index)
            break


def drug_findings(sentence: Sentence) -> Iterator[Finding]:
    """Drugs, known by their endings, that the note does not name."""
    words = sentence.summary.words
    for index in range(sentence.first, sentence.last):
        is_drug = (
            words[index].endswith(_DRUG_ENDINGS) and len(words[index]) > 5 and words[index] not in _NO_DRUGS
        )
        if is_drug and not sentence.note.has(sentence.summary, index):
            yield sentence.finding("drug", index, index)


RULES = (
    *(marker_findings, quantity_findings, direction_findings, polarity_findings),
    *(certainty_findings, plan_findings, person_findings, drug_findings),
)
