"""Reads a text once: its words with what holds for each of them (denied, whose), its markers, its numbers."""

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise

from sft.grounding.quantities import UNITS, find_quantities
from sft.grounding.sentences import SENTENCE_VERSION, sentence_spans
from sft.grounding.words import LEXICON, TOKEN, groups, is_content, stem, word_set

NEGATIONS = word_set("negations")
HEDGES = word_set("hedges")
CONDITIONS = word_set("conditions")
KIN = {form: name for word, name in groups("kin").items() for form in (word, word + "s")}
GENERAL_KIN = word_set("general kin")
# {word: (kind of marker, value)}: a summary's marker must be the one that stands at this place of the note
MARKERS = {
    word: (name.removeprefix("marker "), value)
    for name in LEXICON
    if name.startswith("marker ")
    for word, value in groups(name).items()
} | {word: ("kin", name) for word, name in KIN.items()}
MONTHS = list(dict.fromkeys(groups("marker month").values()))
_SELF = frozenset("he she his her i my patient".split())
_CLAUSE = frozenset(", ; : . ? ! ( ) and but with who whose which".split())
_LINKS = frozenset("of the a in - her his".split())
_OPENINGS = frozenset("a an the her his their she he they then now".split()) | HEDGES
# "Two times daily"
_TIMES = {"two": "bd", "2": "bd", "three": "tds", "3": "tds", "four": "qds", "4": "qds"}
# "?pneumonia" and "Imp: ? pneumonia" are doubts: a mark of its own, of the same length. "Pain ? No." is none
_DOUBT = re.compile(r"(?<![^\s(/,:;?-])\?(?=\w)|(?:^|(?<=[:(/,;.-])|(?<=[:(/,;.-] ))\?(?= \w)")
_UNKNOWN = frozenset("know remember recall".split())
_OR = frozenset(("or", "nor"))
_SEPARATORS = frozenset(", or and nor /".split())
_QUESTIONS = [[verb, subject] for verb in "do have are did has does is".split() for subject in ("you", "any")]
_END, _PREPOSITIONS, _FINITE = map(word_set, ("end of negation", "prepositions", "finite"))
_HOLDS, _NO, _YES = map(word_set, ("holds", "no", "yes"))
# "Right now", "left the hospital" name no side
_AFTER_NO_SIDE = frozenset("the her his him over home now away".split())


class Text:
    """The tokens of a text and what holds for each: arrays of one length, made in one pass.

    `stems`: the stem of a content word, "" for any other token. `denied`: True, False, or None where
    an unanswered question leaves it open. `kin`: the relative of whom the words speak, "" for the patient.
    `clauses`, `phrases`: how many began before a token. `markers`: {class: [(token, value)]} for sides,
    times, relatives. `ranges`: (first token, one past the last) of each sentence."""

    def __init__(self, text: str, sentence_version: int = SENTENCE_VERSION):
        lower = text.lower() if len(text.lower()) == len(text) else text
        matches = list(TOKEN.finditer(_DOUBT.sub("¿", lower)))
        self.text = text
        self.spans = [match.span() for match in matches]
        self.words = [match.group().replace("’", "'").removesuffix("'s") for match in matches]
        self.stems = [stem(word) if is_content(word) else "" for word in self.words]
        # "Imp: ? PE": the doubt is about the next sentence
        doubts = {match.end() + 1: match.start() for match in _DOUBT.finditer(text)}
        starts = [doubts.get(start, start) for start, _ in sentence_spans(text, sentence_version)]
        self.sentence_of = [max(0, bisect_right(starts, start) - 1) for start, _ in self.spans]
        edges = [bisect_left(self.sentence_of, number) for number in range(len(starts) + 1)]
        self.ranges = list(pairwise(edges))
        self.quantities = find_quantities(self.words)
        self.clauses = list(accumulate(word in _CLAUSE for word in self.words))
        breaks = (not root and word not in _LINKS for word, root in zip(self.words, self.stems))
        self.phrases = list(accumulate(breaks))
        self.denied: list[bool | None] = []
        self.kin: list[str] = []
        for first, last in self.ranges:
            self._read_denials(first, last)
            self._read_holders(first, last)
        self._answer_questions()
        # After it, "he" may be somebody else
        relatives = (i for i, word in enumerate(self.words) if word in KIN or word in GENERAL_KIN)
        self.named_relative = next(relatives, len(self.words))
        self.markers: dict[str, list[tuple[int, str]]] = {}
        for index, word in enumerate(self.words):
            kind, value = MARKERS.get(word, ("", ""))
            if word == "times" and self.word(index - 1) in _TIMES:
                kind, value = "opposite times", _TIMES[self.words[index - 1]]
            if kind and self._is_marker(index, kind):
                self.markers.setdefault(kind, []).append((index, value))

    def word(self, index: int) -> str:
        """The word at `index`, a period outside of the text."""
        return self.words[index] if 0 <= index < len(self.words) else "."

    def plain(self, first: int, last: int) -> str:
        """The words of some tokens, without the marks around them and the bullet or number of a list."""
        plain = " ".join(self.words[first:last]).strip(" .,;:!?-•*–·▪>")
        return re.sub(r"^\d\d? [.)] (?=\D)", "", plain)

    def near(self, index: int, words: frozenset, reach: int) -> int | None:
        """The nearest of certain words in a token's sentence, None if there is none within `reach` tokens; a
        clause between counts as eight."""
        first, last = self.ranges[self.sentence_of[index]]
        distances = {
            at: abs(at - index) + 8 * abs(self.clauses[at] - self.clauses[index])
            for at in range(max(first, index - reach), min(last, index + reach + 1))
            if self.words[at] in words
        }
        nearest = min(distances, key=distances.get, default=None)
        return nearest if nearest is not None and distances[nearest] <= reach else None

    def _read_denials(self, first: int, last: int) -> None:
        until = trigger = -1
        n_denied = 0  # words of this item of a list
        is_open = False
        for index in range(first, last):
            word = self.words[index]
            # "Whether or not", "with or without"
            if (word in NEGATIONS or word.endswith("n't")) and self.word(index - 1) != "or":
                until = index + (2 if word in ("non", "free") else 14)
                trigger, n_denied, is_open = index, 0, False
            elif index <= until and self._ends_denial(index, last, trigger, n_denied):
                until = index
            if word in _SEPARATORS:
                n_denied = 0
                until = max(until, index + 8) if index < until else until
            elif self.stems[index] and index > trigger:
                n_denied += 1
            self.denied.append(None if index <= until and is_open else index <= until)
            # "No cola, toilet before sleep": without "or" nobody knows
            is_open |= word == "," and index < until and not _OR & set(self.words[index : index + 16])

    def _ends_denial(self, index: int, last: int, trigger: int, n_denied: int) -> bool:
        """Whether what was denied from `trigger` on ends here, after `n_denied` words of this item."""
        word = self.words[index]
        # Of each item of a list, three words and no more
        if word in ".;:!?()" or n_denied > 3 or (n_denied and word in _PREPOSITIONS):
            return True
        if word in _END:
            return self.words[trigger] == "none" or any(self.stems[trigger + 1 : index])
        return word in (",", "and") and self._is_clause(index + 1, last)

    def _is_clause(self, first: int, last: int) -> bool:
        """Whether a clause begins here, with a verb or a number, and not the next item of a list."""
        first += self.word(first) == "and"
        for at in range(first, min(last, first + 6)):
            word = self.words[at]
            if word in ",.;" or (word in _SEPARATORS and at > first):
                return False
            is_participle = word.endswith("ed") and (
                at > first or self.word(at + 1) in _PREPOSITIONS | {"of"}
            )
            is_opening = at == first and word in _OPENINGS
            if is_opening or word in _FINITE or is_participle or word[0].isdigit() or word in KIN:
                return True
        return False

    def _read_holders(self, first: int, last: int) -> None:
        """Marks what a sentence says of a relative: "her sister has dementia"."""
        holder = ""
        for index in range(first, last):
            word = self.words[index]
            if word in KIN:
                holder = KIN[word] if _HOLDS & set(self.words[index + 1 : min(last, index + 6)]) else ""
            elif word in _SELF or word in ";:.!/-":
                holder = ""
            self.kin.append(holder)

    def _answer_questions(self) -> None:
        """The words of a question, or of several, are denied or affirmed by the turn that follows."""
        answer = None
        for (first, last), (start, end) in reversed(list(pairwise(self.ranges))):
            if not self._is_question(start, end):
                answer = self._read_answer(self._turn(start, end)[:8])
            if last > first and self._is_question(first, last):
                self.denied[first:last] = [answer] * (last - first)

    def _turn(self, first: int, last: int) -> list[str]:
        """The words of a sentence without the name of the speaker."""
        words = self.words[first:last]
        return words[words.index(":") + 1 :] if ":" in words[:4] else words

    def _is_question(self, first: int, last: int) -> bool:
        words = self._turn(first, last)
        return words[-1:] == ["?"] or words[:2] in _QUESTIONS

    def _read_answer(self, words: list[str]) -> bool | None:
        """True: "no"; False: "yes"; None: neither, or "no" to a part, as in "No drugs, but I drink"."""
        for word, following in pairwise([*words[:4], "."]):
            if word in _NO or (word == "not" and not is_content(following)):
                is_part = is_content(following) and (word == "no" or following in _UNKNOWN)
                return None if is_part else True
            if word in _YES and following != "not":
                return False
        return None

    def _is_marker(self, index: int, kind: str) -> bool:
        word, before, following = (self.word(at) for at in (index, index - 1, index + 1))
        if kind == "month" and word in ("may", "march"):
            is_month = any(re.fullmatch(r"\d+|of|in|last|next|since", w) for w in (before, following))
            # So that the month is not taken for the verb
            self.words[index] = word.title() if is_month else word
            return is_month
        if kind == "side" and len(word) == 1:
            # R and L, but not "5 L"
            is_unit = before == "/" or before[-1].isdigit() or following in UNITS
            return self.text[self.spans[index][0]].isupper() and following[0].isalpha() and not is_unit
        return kind != "side" or following not in _AFTER_NO_SIDE
