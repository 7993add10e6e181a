"""Reads a text once: its words with what holds for each of them (denied, whose), its markers."""

import re
from itertools import accumulate

from sft.grounding.quantities import UNITS, Quantity, find_quantities
from sft.grounding.sentences import sentence_spans
from sft.grounding.words import TOKEN, is_content, stem

_AFTER_ITS_NOUN = frozenset("negative absent nil none unlikely".split())
NEGATIONS = frozenset(
    """no not without denies denied deny denying negative never none nor neither nil absent absence lacks lack
    nope nobody unaware unremarkable didn't don't doesn't isn't wasn't aren't haven't hasn't hadn't won't wouldn't
    non free nothing ø unlikely""".split()
)
_NO = frozenset("no nope nah never none negative don't didn't haven't nothing neither nor".split())
_NOT_AT_ALL = frozenset("really that at to in any currently anymore".split())
_QUESTIONS = [
    f"{verb} {subject}".split()
    for verb in "do have are did has does is".split()
    for subject in "you any".split()
]
_YES = frozenset("yes yeah yep yup yea correct right sure uh-huh definitely exactly absolutely".split())
_TROUBLES = frozenset(
    "problem problems difficulty difficulties issue issues trouble history change changes".split()
)
_PREPOSITIONS = frozenset("on for from at if as to by into".split())
# Where the reach of a negation ends
_END_OF_NEGATION = frozenset(
    """but with however although though except which who he she they it is was are were has had have remains
    started then so because due until since when while other than now after before today only just""".split()
)
# What makes a statement uncertain or conditional in a note
CONDITIONS = frozenset("if unless provided".split())
HEDGES = frozenset(
    """possible possibly probable probably likely may might suspected suspicion query queried presumed
    unclear uncertain perhaps maybe""".split()
)
# What a summary may say for it
SOFT = (
    HEDGES
    | CONDITIONS
    | frozenset(
        """could only allowed suggest suggests suggested suggesting suggestive consider considered consideration considering consistent
    apparent apparently unconfirmed equivocal indeterminate presumably favour favoured favor favored thought thinks
    believes believed unsure seems appears whether versus vs excluded exclude confirmed awaiting awaited pending ?
    differential should when until once cannot depending impression unlikely query
    except unestablished unknown risk suspects suspect case""".split()
    )
)
# Words that negate of themselves: what is beside them may stand denied or not
SELF_NEGATING = frozenset(
    """unable difficulty difficult loss lost stop stopped avoid avoided avoids refuse refused decline declined resolved
    worse better prevent held withheld off quit discontinued ceased excluded ruled lack failed never barely hardly
    rather instead improved free intact clear normal less reduced unsure unknown awaiting pending""".split()
)
_KIN = """mother mum mom | father dad | brother | sister | son | daughter | wife husband |
partner spouse boyfriend girlfriend | grandmother grandma nan granny mgm pgm | grandfather grandpa mgf pgf | aunt | uncle | cousin | niece |
nephew | carer caregiver caretaker | neighbor neighbour | friend | housemate roommate flatmate | grandson |
granddaughter"""
KIN = {
    name: group.split()[0]
    for group in _KIN.split("|")
    for word in group.split()
    for name in (word, word + "s")
}
# Words that may stand for any of them
GENERAL_KIN = {name: frozenset("mother father".split()) for name in ("parent", "parents")}
GENERAL_KIN |= {name: frozenset("brother sister".split()) for name in ("sibling", "siblings")}
GENERAL_KIN |= {name: frozenset("son daughter".split()) for name in ("child", "children", "kids", "kid")}
SELF = frozenset("he she his her i my patient patient's".split())

# Classes of words that say where and when; a summary's word must be the one that stands at the same place
_MARKERS = {
    "side": "left l lt left-sided / right r rt / bilateral bilaterally both",
    "level": "upper / lower",
    "aspect": "medial / lateral",
    "front": "anterior / posterior",
    "reach": "proximal / distal",
    "order": "before pre preceding prior / after post following since",
    "when": "yesterday / today tonight / tomorrow",
    "shift": "earlier / later",
    "weekday": "monday mondays mon/tuesday tuesdays tue tues/wednesday wednesdays wed weds/thursday thursdays thu thur thurs"
    "/friday fridays fri/saturday saturdays sat/sunday sundays sun",
    "month": "january jan/february feb/march/april apr/may/june jun/july jul/august aug/september sept sep/october oct"
    "/november nov/december dec",
    "result": "negative / positive",
    "change": "increase increased increasing rise rose rising worse worsened worsening up higher / decrease decreased"
    " decreasing fall fell falling improved improving down lower reduced",
    "course": "start started starting begin began begun initiated commenced / stop stopped discontinued ceased held"
    " withheld",
}
MARKERS = {
    name: (kind, values.split()[0])
    for kind, text in _MARKERS.items()
    for values in text.split("/")
    for name in values.split()
}
# What makes a relative the one of whom a sentence speaks
_HOLDS = frozenset(
    "has had with died dies passed took developed suffered diagnosed carries got also is was were being found age gets".split()
)
_PERIODS = frozenset(
    "night day week weekend month year morning evening afternoon spring summer autumn winter".split()
)
_FINITE = frozenset(
    """is was are were has had have should will would may can could shall goes went starts started takes took remains
    sent given requested planned recorded booked placed advised today yet wants needs continues continued does did shows showed than due at on after before""".split()
)
_CLAUSE = frozenset(", ; : . ? ! ( ) and but with who whose which".split())
_NO_SIDE_AFTER = frozenset("now away here there after before then ? . , ! okay so and on".split())
_NO_SIDE_BEFORE = frozenset(
    "all that's that is yeah was were has have had just been alright : . , ? you he she".split()
)


class Text:
    """The tokens of a text and what holds for each: arrays of one length, made in one pass.

    `stems`: the stem of a content word, "" for any other token. `denied`: True, False, or None where
    an unanswered question leaves it open. `kin`: the relative of whom the words speak, "" for the patient.
    `markers`: {class: [(token, value)]} for sides, times, relatives.
    """

    def __init__(self, text: str):
        lower = text.lower() if len(text.lower()) == len(text) else text
        matches = list(TOKEN.finditer(lower))
        self.text = text
        self.spans = [match.span() for match in matches]
        self.words = [match.group().replace("’", "'").removesuffix("'s") for match in matches]
        self.stems = [stem(word) if is_content(word) else "" for word in self.words]
        self.sentences = sentence_spans(text)
        self.sentence_of = self._number_sentences()
        gaps = [i > 0 and self.spans[i - 1][1] < start for i, (start, _) in enumerate(self.spans)]
        self.quantities = find_quantities(self.words, gaps)
        self.quantities_of: list[list[Quantity]] = [[] for _ in self.sentences]
        for quantity in self.quantities:
            self.quantities_of[self.sentence_of[quantity.index]].append(quantity)
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
        ranges = [[0, 0] for _ in self.sentences]
        for index, number in enumerate(self.sentence_of):
            if ranges[number][1] == 0:
                ranges[number][0] = index
            ranges[number][1] = index + 1
        return [(first, last) for first, last in ranges]

    def _read_scopes(self, first: int, last: int) -> None:
        """Marks what a sentence denies, and what it says of a relative."""
        denied_until = trigger = -1
        n_denied = 0
        is_verb = False
        holder = ""
        for index in range(first, last):
            word = self.words[index]
            if (word in NEGATIONS or word.endswith("n't")) and self.words[index + 1 : index + 2] != ["by"]:
                denied_until = index + (2 if word in ("non", "free") else 14)
                trigger = index
                n_denied = 0
                # "does not drink and smokes": the list of a verb ends sooner than that of a noun
                is_verb = word in ("not", "never") or word.endswith("n't")
                following = self.words[index + 1] if index + 1 < last else ""
                if following == ",":
                    denied_until = index
                if word in _AFTER_ITS_NOUN and following != "for":
                    self._mark_back(first, index)
            elif index <= denied_until and word in ".;:!?(":
                denied_until = index
            elif index <= denied_until and (
                trigger + 2 < index
                and word in _END_OF_NEGATION
                and self.words[index - 1] not in _TROUBLES
                or n_denied > 0
                and word in _PREPOSITIONS
                or n_denied > 3
                or is_verb
                and word == "and"
                or self._new_clause(index, last)
            ):
                denied_until = index
            if word in KIN:
                holder = KIN[word] if _HOLDS & set(self.words[index + 1 : min(last, index + 6)]) else ""
            elif holder and (word in ";:.!/-" or word in SELF):
                holder = ""
            # Of each item of a list, three words and no more
            if word in (",", "or", "and", "nor", "/"):
                n_denied = 0
                denied_until = max(denied_until, index + 8) if index <= denied_until - 1 else denied_until
            else:
                n_denied += bool(self.stems[index] and index > trigger)
            self.denied[index] = self.denied[index] or index <= denied_until
            self.kin[index] = holder

    def _new_clause(self, index: int, last: int) -> bool:
        """Whether a comma or an "and" begins a clause of its own, with a verb or a number, and not a list's next item."""
        if self.words[index] not in (",", "and"):
            return False
        if self.words[index + 1 : index + 2] and self.words[index + 1] in (
            "a",
            "an",
            "the",
            "possible",
            "probable",
        ):
            return True
        for at in range(index + 1, min(last, index + 7)):
            word = self.words[at]
            if word in ",.;" or word in ("and", "or", "nor") and at > index + 1:
                return False
            if word in _FINITE or word[0].isdigit() or word in KIN:
                return True
        return False

    def _mark_back(self, first: int, index: int) -> None:
        """Denies what stands before "negative" or "absent", in the same clause."""
        for before in range(index - 1, max(first, index - 6) - 1, -1):
            if self.words[before] in ";.:,":
                break
            self.denied[before] = True

    def _answer_questions(self) -> None:
        """The words of a question are denied or affirmed by the turn that follows, also those of several in a row."""
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
            if word in _NO or word == "not" and following in _NOT_AT_ALL:
                return None if is_content(following) and word == "no" else True
            if word in _YES:
                return False
        return None

    def _find_markers(self) -> None:
        for index, word in enumerate(self.words):
            kind, value = MARKERS.get(word, ("", ""))
            if word in KIN:
                kind, value = "kin", KIN[word]
            elif index and self.words[index - 1] in ("last", "next", "past", "this") and word in _PERIODS:
                kind, value = "period", word
            if not kind or kind == "side" and not self._is_side(index):
                continue
            if word in ("may", "march") and not self._beside_number(index):
                continue
            if kind == "month":
                # So that the month is not taken for the verb
                self.words[index] = word.title()
            self.markers.setdefault(kind, []).append((index, value))

    def _is_side(self, index: int) -> bool:
        word = self.words[index]
        following = self.words[index + 1] if index + 1 < len(self.words) else "."
        before = self.words[index - 1] if index else "."
        if len(word) == 1:
            upper = self.text[self.spans[index][0]].isupper()
            is_noun = (
                following.isalpha()
                or index + 2 < len(self.words)
                and self.words[index + 2] in ("nd", "rd", "th", "st")
            )
            return upper and before != "/" and is_noun and not before[-1].isdigit() and following not in UNITS
        if word == "both":
            return following.endswith("s")
        if word == "right":
            is_talk = (
                following in _NO_SIDE_AFTER and before in _NO_SIDE_BEFORE or following in ("now", "away")
            )
            return not (is_talk or before == "all")
        is_verb = word == "left" and (
            before in _NO_SIDE_BEFORE - set(":.,?") or following in ("the", "her", "his", "him")
        )
        return not (
            is_verb and following in ("the", "her", "his", "him", "over", "hospital", "home", "to", ".")
        )

    def _beside_number(self, index: int) -> bool:
        around = self.words[max(0, index - 2) : index] + self.words[index + 1 : index + 2]
        return any(re.fullmatch(r"\d+|of|in|last|next|since", word) for word in around)
