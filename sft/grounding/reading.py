"""Reads a text once: its words with what holds for each of them (denied, whose), its markers, its numbers."""

import re
from itertools import accumulate

from sft.grounding.quantities import UNITS, find_quantities
from sft.grounding.sentences import SENTENCE_VERSION, sentence_spans
from sft.grounding.words import LEXICON, TOKEN, groups, is_content, stem, word_set

NEGATIONS = word_set("negations") | {word + "n't" for word in "could should".split()}
HEDGES = word_set("hedges")
CONDITIONS = word_set("conditions")
SOFT = word_set("soft") | HEDGES | CONDITIONS
SELF_NEGATING = word_set("self-negating")
KIN = {form: name for word, name in groups("kin").items() for form in (word, word + "s")}
# Words that may stand for any of several relatives
GENERAL_KIN = {
    general: frozenset(names.split())
    for words, names in {
        "parent parents": "mother father",
        "sibling siblings": "brother sister",
        "child children kid kids": "son daughter",
    }.items()
    for general in words.split()
}
# {word: (kind of marker, value)}: a summary's marker must be the one that stands at this place of the note
MARKERS = {
    word: (name.removeprefix("marker "), value)
    for name in LEXICON
    if name.startswith("marker ")
    for word, value in groups(name).items()
}
_SELF = frozenset("he she his her i my patient".split())
_CLAUSE = frozenset(", ; : . ? ! ( ) and but with who whose which".split())
_OPENINGS = frozenset("a an the her his their she he they then now".split()) | HEDGES
_OR = frozenset(("or", "nor"))
_UNKNOWN = frozenset("know remember recall".split())
_SEPARATORS = frozenset(", or and nor /".split())
_QUESTIONS = [[verb, subject] for verb in "do have are did has does is".split() for subject in ("you", "any")]
_END, _PREPOSITIONS, _FINITE = map(word_set, ("end of negation", "prepositions", "finite"))
_TROUBLES, _HOLDS, _NO, _YES = map(word_set, ("troubles", "holds", "no", "yes"))
# "All right", "right now", "left the hospital" name no side
_NO_SIDE = re.compile(
    r"(?:all|that's|you're|yeah|\.|,|:) right [^\w]|. right (?:now|away)|\S+ left (?:the|her|his|him|over|home)"
)


class Text:
    """The tokens of a text and what holds for each: arrays of one length, made in one pass.

    `stems`: the stem of a content word, "" for any other token. `denied`: True, False, or None where
    an unanswered question leaves it open. `kin`: the relative of whom the words speak, "" for the patient.
    `markers`: {class: [(token, value)]} for sides, times, relatives.
    """

    def __init__(self, text: str, sentence_version: int = SENTENCE_VERSION):
        lower = text.lower() if len(text.lower()) == len(text) else text
        matches = list(TOKEN.finditer(lower))
        self.text = text
        self.spans = [match.span() for match in matches]
        self.words = [match.group().replace("’", "'").removesuffix("'s") for match in matches]
        self.stems = [stem(word) if is_content(word) else "" for word in self.words]
        self.sentences = sentence_spans(text, sentence_version)
        self.sentence_of = self._number_sentences()
        gaps = [i > 0 and self.spans[i - 1][1] < start for i, (start, _) in enumerate(self.spans)]
        self.quantities = find_quantities(self.words, gaps)
        n = len(self.words)
        self.denied: list[bool | None] = [False] * n
        self.kin = [""] * n
        # How many clauses began before each token: words of other clauses are farther away
        self.clauses = list(accumulate(word in _CLAUSE for word in self.words))
        self.markers: dict[str, list[tuple[int, str]]] = {}
        self.ranges = self._sentence_ranges()
        for first, last in self.ranges:
            self._read_scopes(first, last)
        self._answer_questions()
        self._find_markers()
        # The first token that names a relative: after it, "he" may be somebody else
        self.named_relative = next(
            (i for i, word in enumerate(self.words) if word in KIN or word in GENERAL_KIN), n
        )

    def _number_sentences(self) -> list[int]:
        numbers = []
        number = 0
        for start, _ in self.spans:
            while number + 1 < len(self.sentences) and start >= self.sentences[number][1]:
                number += 1
            numbers.append(number)
        return numbers

    def _sentence_ranges(self) -> list[tuple[int, int]]:
        """(first token, one past the last) of each sentence."""
        lasts = [0] * len(self.sentences)
        for index, number in enumerate(self.sentence_of):
            lasts[number] = index + 1
        lasts = list(accumulate(lasts, max))
        return list(zip([0, *lasts], lasts))

    def _read_scopes(self, first: int, last: int) -> None:
        """Marks what a sentence denies, and what it says of a relative."""
        denied_until = trigger = -1
        n_denied = 0
        is_open = False
        holder = ""
        for index in range(first, last):
            word = self.words[index]
            following = self.words[index + 1] if index + 1 < last else ""
            # "Whether or not", "with or without"
            is_or = word in ("not", "without") and self.words[max(0, index - 1)] == "or"
            is_idiom = is_or or following in ("by", "pressure")
            if (word in NEGATIONS or word.endswith("n't")) and not is_idiom:
                reach = 0 if following == "," else 2 if word in ("non", "free") else 14
                denied_until, trigger, n_denied, is_open = index + reach, index, 0, False
            elif index <= denied_until and self._ends_denial(index, last, trigger, n_denied):
                denied_until = index
            if word in KIN:
                is_source = index > first and self.words[index - 1] in ("per", "by", "to")
                is_holder = not is_source and _HOLDS & set(self.words[index + 1 : min(last, index + 6)])
                holder = KIN[word] if is_holder else ""
            elif word in _SELF or word in ";:.!/-":
                holder = ""
            if word not in _SEPARATORS:
                n_denied += bool(self.stems[index] and index > trigger)
            else:
                n_denied = 0
                denied_until = max(denied_until, index + 8) if index < denied_until else denied_until
            self.denied[index] = None if index <= denied_until and is_open else index <= denied_until
            # "No cola, toilet before sleep": without "or" nobody knows
            is_open |= word == "," and index < denied_until and not _OR & set(self.words[index : index + 16])
            self.kin[index] = holder

    def _ends_denial(self, index: int, last: int, trigger: int, n_denied: int) -> bool:
        """Whether what was denied from `trigger` on ends here, after `n_denied` words of this item."""
        word = self.words[index]
        # Of each item of a list, three words and no more
        if word in ".;:!?()" or n_denied > 3 or (n_denied and word in _PREPOSITIONS):
            return True
        if word in _END or (n_denied and word in _FINITE):
            return any(self.stems[trigger + 1 : index]) and self.words[index - 1] not in _TROUBLES
        return word in (",", "and") and self._is_clause(index + 1, last)

    def _is_clause(self, first: int, last: int) -> bool:
        """Whether a clause begins here, with a verb or a number, and not the next item of a list."""
        first += self.words[first : first + 1] == ["and"]
        if _OPENINGS & set(self.words[first : first + 1]):
            return True
        for at in range(first, min(last, first + 6)):
            word, following = self.words[at], "".join(self.words[at + 1 : at + 2])
            if word in ",.;" or (word in _SEPARATORS and at > first):
                return False
            is_participle = word.endswith("ed") and (
                at > first or following in _PREPOSITIONS or following == "of"
            )
            if word in _FINITE or is_participle or word[0].isdigit() or word in KIN:
                return True
        return False

    def _answer_questions(self) -> None:
        """The words of a question, or of several, are denied or affirmed by the turn that follows."""
        answer = None
        for number in range(len(self.ranges) - 2, -1, -1):
            first, last = self.ranges[number]
            start, end = self.ranges[number + 1]
            if not self._is_question(start, end):
                answer = self._read_answer(start, end)
            if last > first and self._is_question(first, last):
                self.denied[first:last] = [answer] * (last - first)

    def _is_question(self, first: int, last: int) -> bool:
        words = self.words[first:last]
        begin = words.index(":") + 1 if ":" in words[:4] else 0
        return words[-1:] == ["?"] or words[begin : begin + 2] in _QUESTIONS

    def _read_answer(self, first: int, last: int) -> bool | None:
        """True: "no"; False: "yes"; None: neither, or "no" to a part, as in "No drugs, but I drink"."""
        words = self.words[first : min(last, first + 8)]
        words = words[words.index(":") + 1 :] if ":" in words[:4] else words
        for index, word in enumerate(words[:4]):
            following = words[index + 1] if index + 1 < len(words) else "."
            if word in _NO and following in _UNKNOWN:
                return None
            if word in _NO or (word == "not" and not is_content(following)):
                return None if is_content(following) and word == "no" else True
            if word in _YES and following != "not":
                return False
        return None

    def _find_markers(self) -> None:
        for index, word in enumerate(self.words):
            before = self.words[index - 1] if index else "."
            following = self.words[index + 1] if index + 1 < len(self.words) else "."
            kind, value = MARKERS.get(word, ("", ""))
            if word in KIN:
                kind, value = "kin", KIN[word]
            if kind == "side":
                # R and L, but not "5 L"
                is_name = self.text[self.spans[index][0]].isupper() and re.match(r"[a-z]|\d+[a-z]", following)
                is_unit = before == "/" or before[-1].isdigit() or following in UNITS
                is_none = len(word) == 1 and (is_unit or not is_name)
                is_none = is_none or _NO_SIDE.match(f"{before} {word} {following}")
                kind = "" if is_none or (word == "both" and not following.endswith("s")) else kind
            elif kind == "month":
                around = [*self.words[max(0, index - 2) : index], following]
                is_verb = word in ("may", "march") and not any(
                    re.fullmatch(r"\d+|of|in|last|next|since", w) for w in around
                )
                # So that the month is not taken for the verb
                self.words[index] = word if is_verb else word.title()
                kind = "" if is_verb else kind
            if kind:
                self.markers.setdefault(kind, []).append((index, value))

    def with_noun(self, index: int) -> tuple[int, int]:
        """(a token, the word after it if that carries meaning): "left", "knee"."""
        return index, index + (index + 1 < len(self.stems) and self.stems[index + 1] != "")
