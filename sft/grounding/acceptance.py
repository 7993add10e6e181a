"""Whether a written sentence can be traced to the part of the note that it was written from.

A sentence may stand if its content is whole clauses of the part: each word as often and in the order in which
it stands there, each clause at most once. Clauses may change places or be left out, light words come and go,
shorthand be spelled out. Whatever a rule cannot follow is refused: the note's own words stand instead, so
that a needless refusal costs style and nothing else. Time is linear in the length of the texts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sft.grounding.citations import strip_citations
from sft.grounding.parts import patient_line
from sft.grounding.reading import CONDITIONS, GENERAL_KIN, HEDGES, KIN, MARKERS
from sft.grounding.shorthand import key, spell_out, use_short_forms
from sft.grounding.structure import shown_label, topic_of
from sft.grounding.words import TOKEN

_LISTS = """
articles: a an the
present: is are has have
past: was were had
be: is are was were be been being
have: has have had
subject: he she they patient patients pt
report: report reports reported complains presents presented presenting states stated
joiners: and but with who which while although though however
turns: but although though however except while when once
light: his her their of in on at there also still currently " “ ” ‘ ’ *
others: i me my mine we us our you your donor donors recipient relative relatives please kindly dr doctor doctors gp gps nurse nurses surgeon surgeons consultant team teams midwife physio therapist paramedic paramedics baby twin staff pharmacist dietitian radiologist oncologist cardiologist neurologist colleague
scopes: no not never neither cannot
negations: none nor neg absent negative unlikely
undone: stopped held withheld discontinued ceased canceled cancelled declined refused failed changed switched removed instead except until unless now from reason only rather versus vs down up reduced increased withdrawn abandoned
sides: left right both bilaterally family
changes: ago last previous previously childhood after then later rising rose fell falling improving improved resolved settled better worse yesterday
future: will plan planned tomorrow tonight due await awaiting awaited pending book booked to should would may might if once when aim target next request requested consider considered repeat
commands: start stop continue increase reduce refer review return recheck order follow hold avoid switch arrange obtain perform proceed schedule give take check monitor keep remove send ring call discuss restart discharge admit add change commence complete wean transfer use for
prepositions: for from to by after before due because since until despite via per under over into onto than as if unless or within between through during about around when where whether so like plus times
adverbs: last largest maximum not now then later previously recently never subsequently again
own verbs: fell took drank woke tested developed collapsed vomited complained improved remained recovered noticed responded fainted tripped tolerated settled deteriorated survived slipped
ahead: in at after every within
times: minute hour day week fortnight month year
male: he him his man boy mr
female: she her hers woman girl mrs ms
"""
_WORDS = {name: frozenset(words.split()) for name, words in re.findall("(.+): (.+)", _LISTS)}
_WORDS["undone"] |= CONDITIONS | _WORDS["turns"]
# What is said of or to anybody but the patient keeps every word
_OTHERS = _WORDS["others"] | frozenset(KIN) | frozenset(GENERAL_KIN)
# A denial, doubt or condition reaches over what follows; without any of the guards, what stays would say more
_SCOPES = _WORDS["scopes"] | HEDGES | CONDITIONS
_GUARDS = frozenset().union(
    _SCOPES, _OTHERS, *(_WORDS[name] for name in ("negations", "undone", "sides", "changes"))
)
_GUARDS |= set(map(key, _GUARDS))
_BREAKS = frozenset(", ; : . ( ) - – — / ! ? \n".split(" "))
_AUXILIARY = _WORDS["be"] | _WORDS["have"]
_PARTING = _WORDS["joiners"] | _WORDS["have"] | _BREAKS
_PLACES = frozenset("of in on at".split())
_ANEW = frozenset((";", ".", "but")) | _WORDS["subject"] | _AUXILIARY
_FREE = _AUXILIARY.union(*(_WORDS[name] for name in ("articles", "subject", "report", "joiners", "light")))
_LABEL = re.compile(r"\s*([^.;:?!\n]{1,45}|\d\d?[:.]\d\d):(?=\s)")
_OPENING = re.compile(
    r"\s*(?:an?|the|this)?\s*(?:(\d{1,3}) yearold\s+)?(man|woman|lady|gentleman|male|female)\b", re.IGNORECASE
)
_PARTICIPLE = re.compile(
    r"\w+ed|given|taken|seen|done|sent|held|told|found|shown|known|put|kept|begun|driven|drawn"
)
_MOST_CANDIDATES = 8


class _Read:
    """The content words of a text as keys, and the light words and marks before each and after the last."""

    def __init__(self, text: str, free: frozenset[str]):
        self.words: list[str] = []
        self.content: list[str] = []
        self.gaps: list[list[str]] = [[]]
        for match in re.finditer(rf"\n|{TOKEN.pattern}", spell_out(text).lower()):
            word = match.group()
            self.words.append(key(word))
            if word in free or word in _BREAKS:
                self.gaps[-1].append(word)
            else:
                self.content.append(key(word))
                self.gaps.append([])


@dataclass
class _Clause:
    """Some content words of the part that stand or fall together."""

    first: int  # of its content words, in the part
    last: int  # one past the last
    sentence: int  # of the part, up to a full stop or semicolon
    leans: bool  # it says nothing without the clause before it
    words: frozenset[str] = frozenset()
    label: str = ""  # the label that it is, as it stands
    is_plan: bool = False


@dataclass
class _Step:
    """One content word of the sentence: its clause and what stands before it, in the part and here."""

    clause: int
    begins: bool
    word: str
    index: int  # in the part
    old: frozenset[str]
    new: frozenset[str]
    after: frozenset[str]  # what stands after it in the sentence


@dataclass
class _Traced:
    """A sentence laid beside its part."""

    source: _Read
    written: _Read
    clauses: list[_Clause]
    kept: list[int]  # the clauses that it holds, in its order
    steps: list[_Step]
    is_strict: bool
    note: str

    def dropped(self) -> list[int]:
        return sorted(set(range(len(self.clauses))) - set(self.kept))


def accept(part: str, sentence: str, note: str, shorthand: Mapping[str, Sequence[str]] = {}) -> list[str]:
    """Why `sentence` may not stand for `part`, in a few words each; empty: it may.

    `part`: the note's words that it was written from; `note`: the whole note, for who the patient is;
    `shorthand`: what summaries say for the note's short forms (`learn_shorthand`).
    """
    words = set(_Read(part, frozenset()).words)
    is_strict = bool(words & _OTHERS)
    free = _WORDS["articles"] if is_strict else _FREE
    sentence = strip_citations(sentence)
    if not is_strict:
        sentence = _shorten_opening(sentence, part, note)
    source, written = (_Read(use_short_forms(text, words, shorthand), free) for text in (part, sentence))
    if " ".join(source.words).rstrip(" .") == " ".join(written.words).rstrip(" ."):
        return []
    if not written.content:
        return ["says nothing of its part"]
    known = set(source.content)
    missing = next((word for word in written.content if word not in known), None)
    if missing is not None:
        return [f"not in the note at this place: '{missing}'"]
    clauses = _clauses(part, source)
    kept = _match(clauses, source.content, written.content)
    if kept is None:
        return ["words left out, added, doubled or moved inside a clause"]
    traced = _Traced(source, written, clauses, kept, _steps(source, written, clauses, kept), is_strict, note)
    return [reason for rule in RULES if (reason := rule(traced))]


def _sex(note: str) -> str:
    """ "male" or "female" as the note says of its patient, "" if it does not."""
    for text in (patient_line(note), note):
        sentences = [TOKEN.findall(one) for one in re.split(r"[.;\n]", spell_out(text).lower())]
        words = {key(word) for one in sentences if _OTHERS.isdisjoint(one) for word in one}
        found = [sex for sex in ("male", "female") if words & _WORDS[sex]]
        if len(found) == 1:
            return found[0]
    return ""


def _shorten_opening(sentence: str, part: str, note: str) -> str:
    """ "A 60-year-old man" becomes "the patient" where the note says so and the part does not."""
    spelled = spell_out(sentence)
    opening = _OPENING.match(spelled)
    part = spell_out(part).lower()
    if not opening or "yearold" in part or opening[0].strip().lower() in part:
        return sentence
    ages = re.findall(r"(\d{1,3}) yearold ", spell_out(patient_line(note)))
    is_same_sex = key(opening[2].lower()) in _WORDS.get(_sex(note), ())
    is_same = is_same_sex and (opening[1] is None or ages[:1] == [opening[1]])
    return "The patient" + spelled[opening.end() :] if is_same else sentence


def _clauses(part: str, source: _Read) -> list[_Clause]:
    """The clauses of the part: cut at marks, at joining words and before "of 38.5"."""
    clauses: list[_Clause] = []
    sentence = 0
    for index, word in enumerate(source.content):
        gap = set(source.gaps[index])
        is_anew = index > 0 and not gap.isdisjoint(".;\n?!")
        sentence += is_anew
        if clauses and not gap & (_BREAKS | _WORDS["joiners"]) and not (word[0].isdigit() and "of" in gap):
            clauses[-1].last = index + 1
            continue
        leans = index > 0 and not is_anew and (not gap & _BREAKS or bool(gap & _WORDS["joiners"] - {"and"}))
        clauses.append(_Clause(index, index + 1, sentence, leans))
    lines = re.split(r"(?<=[.;?!])\s+|\n", part)
    labels = [match[1] for line in lines if (match := _LABEL.match(line))]
    before, is_plan = None, False
    for clause in clauses:
        content = source.content[clause.first : clause.last]
        clause.words = frozenset(content) | frozenset(source.gaps[clause.first])
        is_first = before is None or before.sentence != clause.sentence
        if is_first and labels and ":" in source.gaps[clause.last]:
            clause.label = labels.pop(0)
        clause.leans = clause.leans or (before is not None and not _stands_alone(content, before, is_first))
        is_plan = "plan" in topic_of(clause.label) if clause.label else is_plan
        clause.is_plan = is_plan or _says_plan(source, clause, content)
        before = clause
    _spread_plans(clauses)
    return clauses


def _stands_alone(content: list[str], before: _Clause, is_first: bool) -> bool:
    """Whether a clause says something without the one before it, which ends with a comma, or its sentence."""
    is_done = bool(_PARTICIPLE.fullmatch(content[0])) and content[0] not in _WORDS["own verbs"]
    if is_first or before.label or ("yearold" in before.words and not before.leans):
        return not is_done or bool(before.label)
    leaning = _WORDS["prepositions"] | _WORDS["adverbs"] | _WORDS["turns"]
    if content[0][0].isdigit() or content[0] in leaning or _PARTICIPLE.fullmatch(content[0]):
        return False
    # "BP 120/80, pulse 76", but not "HIV negative, hepatitis C positive, RNA awaited"
    return all(any(word[0].isdigit() for word in words) for words in (content[1:], before.words))


def _says_plan(source: _Read, clause: _Clause, content: list[str]) -> bool:
    """A command, a word for what is to come, or "at 2 and 4 weeks"."""
    if content[0] in _WORDS["commands"] or _WORDS["future"] & set(content):
        return True
    for index in range(clause.first, clause.last):
        after = set(source.content[index + 1 : index + 4])
        before = {*source.gaps[index], *source.content[max(0, index - 1) : index]}
        is_time = source.content[index][0].isdigit() and after & _WORDS["times"] and "ago" not in after
        if is_time and before & _WORDS["ahead"]:
            return True
    return False


def _spread_plans(clauses: list[_Clause]) -> None:
    """What one clause of a sentence plans, the whole sentence may."""
    planned = {clause.sentence for clause in clauses if clause.is_plan}
    for clause in clauses:
        clause.is_plan = clause.sentence in planned


def _match(clauses: list[_Clause], part: list[str], words: list[str]) -> list[int] | None:
    """The clauses that make up the sentence, whole and each once; None if they do not."""
    waiting: dict[str, list[int]] = {}
    for number in range(len(clauses) - 1, -1, -1):
        waiting.setdefault(part[clauses[number].first], []).append(number)
    kept, used, position = [], set(), 0
    while position < len(words):
        following = kept[-1] + 1 if kept else 0
        stack = waiting.get(words[position], [])
        while stack and stack[-1] in used:
            stack.pop()
        # The next clause first, then the longest of a few
        candidates = sorted(stack[-_MOST_CANDIDATES:], key=lambda n: clauses[n].first - clauses[n].last)
        for number in [*range(following, min(following + 1, len(clauses))), *candidates]:
            clause = clauses[number]
            end = position + clause.last - clause.first
            if number not in used and words[position:end] == part[clause.first : clause.last]:
                break
        else:
            return None
        kept.append(number)
        used.add(number)
        position = end
    return kept


def _steps(source: _Read, written: _Read, clauses: list[_Clause], kept: list[int]) -> list[_Step]:
    steps = []
    for number in kept:
        clause = clauses[number]
        for index in range(clause.first, clause.last):
            old, new, after = source.gaps[index], written.gaps[len(steps)], written.gaps[len(steps) + 1]
            step = _Step(
                number,
                index == clause.first,
                source.content[index],
                index,
                *map(frozenset, (old, new, after)),
            )
            steps.append(step)
    return steps


def clauses_keep_their_heads(traced: _Traced) -> str:
    """A clause that leans on the one before it comes right after it."""
    before = -2
    for number in traced.kept:
        is_moved = traced.is_strict and before > number
        if is_moved or (traced.clauses[number].leans and before != number - 1):
            return "a clause stands without what it belongs to"
        before = number
    return ""


def nothing_that_changes_it_is_dropped(traced: _Traced) -> str:
    """What is left out may not limit what stays: a denial, a doubt, a side, a person, an end."""
    sentences = {traced.clauses[number].sentence for number in traced.kept}
    kept = set(traced.kept)
    for number in traced.dropped():
        clause = traced.clauses[number]
        guards = clause.words & (_GUARDS if clause.sentence in sentences else _WORDS["undone"])
        if guards:
            return f"leaves out '{min(guards)}'"
        if clause.sentence not in sentences or clause.label:
            continue
        # "In pregnancy, BP 160/90" and "warfarin 5 mg Monday, 3 mg Tuesday"
        first, gap = traced.source.content[clause.first], set(traced.source.gaps[clause.first])
        is_setting = number + 1 in kept and (gap & {"in", "on", "at"} or first in _WORDS["prepositions"])
        # "If febrile and neutropenic", "no rash with fever"
        scopes = traced.clauses[number - 1].words & _SCOPES if number - 1 in kept else frozenset()
        if clause.leans and scopes and (scopes & CONDITIONS or "," not in gap):
            return f"leaves out what belongs to '{min(scopes)}'"
        is_value = number - 1 in kept and first[0].isdigit() and gap.isdisjoint(("of", "("))
        if is_setting or is_value or any(re.fullmatch(r"(?:19|20)\d\d", word) for word in clause.words):
            return f"leaves out '{first}', which belongs to what stays"
    return ""


def labels_stay_labels(traced: _Traced) -> str:
    """A label is no fact: it stands before its colon, or goes if it only names a part of the note."""
    place = {number: position for position, number in enumerate(traced.kept)}
    for number, clause in enumerate(traced.clauses):
        if not clause.label:
            continue
        labeled = [n for n in traced.kept if n > number and traced.clauses[n].sentence == clause.sentence]
        topic = topic_of(clause.label)
        names_part = (
            topic in ("diagnosis", "reason", "result", "plan", "exam") and "question" not in clause.words
        )
        is_silent = names_part or not shown_label(clause.label) or re.match(r"\d+[:.]", clause.label)
        if labeled and number not in place and not is_silent:
            return f"leaves out the label '{clause.label}'"
        is_moved = any(place[n] < place.get(number, -1) for n in labeled)
        if is_moved or (number in place and traced.kept[place[number] + 1 :][:1] != [number + 1]):
            return f"parts the label '{clause.label}' from what it stands before"
    for step in traced.steps:
        label = traced.clauses[step.clause - 1].label if step.begins and step.clause else ""
        is_said = ":" in step.new or (topic_of(label) == "diagnosis" and step.new & _WORDS["be"])
        if label and step.clause - 1 in place and not is_said:
            return f"tells the label '{label}' as a fact"
    return ""


def questions_stay_questions(traced: _Traced) -> str:
    """What is only asked is not told."""
    ends = {clause.sentence: clause.last for clause in traced.clauses}
    asked = {sentence for sentence, last in ends.items() if "?" in traced.source.gaps[last]}
    if any(traced.clauses[number].sentence in asked for number in traced.kept):
        return "tells a question as a fact"
    return "asks what the note tells" if "?" in traced.written.words else ""


def it_reads_as_a_sentence(traced: _Traced) -> str:
    """Nothing dangles at its ends; the small words that show what belongs together stay."""
    first, last = traced.steps[0], traced.written.gaps[-1]
    starts = _WORDS["articles"] | _WORDS["subject"] | first.old | set('there his her their ( " “'.split())
    if not starts.issuperset(traced.written.gaps[0][:1]) or any(
        word in _FREE or word in ",;:" for word in last
    ):
        return "begins or ends in the middle"
    for step in traced.steps:
        gone, added = (step.old - step.new) & _PLACES, (step.new - step.old) & (_PLACES | _WORDS["subject"])
        is_date = step.word[0].isdigit() or MARKERS.get(step.word, ("",))[0] in ("weekday", "month")
        if step is not first and not is_date and (gone or (added - {"of"} and not step.begins)):
            return "small words changed inside a clause"
    return ""


def clauses_stay_apart(traced: _Traced) -> str:
    """Where a clause ended, the sentence has a mark or a joining word; inside a clause it adds none."""
    before = None
    is_of_patient = bool(_WORDS["subject"] & set(traced.written.gaps[0]))
    for step in traced.steps:
        named = before is not None and "yearold" in traced.clauses[before].words
        is_of_patient = is_of_patient or named
        added = step.new - step.old
        can_have = step.new & _WORDS["subject"] or step.old & (_WORDS["report"] | _WORDS["have"]) or named
        can_have = can_have or before is None or (is_of_patient and added & {"and", ","})
        if (added & _WORDS["have"] and not can_have) or (added & {"who", "which"} and not named):
            return "has one thing have or be another"
        if not step.begins:
            if step.new & _PARTING - {"\n"} and not step.old & (_PARTING | _WORDS["report"]):
                return "joins or parts words inside a clause"
            continue
        is_next = before is not None and before == step.clause - 1
        is_same = is_next and traced.clauses[before].sentence == traced.clauses[step.clause].sentence
        needed = _PARTING if is_same else _BREAKS | {"and", "but", "while"}
        if is_same and traced.clauses[before].label:
            needed = needed | _WORDS["be"]
        elif is_same and step.word[0].isdigit():
            needed = needed | {"of"}
        if before is not None and not needed & step.new:
            return "runs two clauses together"
        before = step.clause
    return ""


def denials_and_doubts_keep_their_reach(traced: _Traced) -> str:
    """After "no", "possible" or "if" the words that join stay as they are, and what is new begins anew."""
    begun_anew = {step.clause for step in traced.steps if step.new & _ANEW}
    before, is_in_reach = None, False
    for step in traced.steps:
        if not step.begins:
            continue
        clause = traced.clauses[step.clause]
        is_next = before is not None and step.clause == before + 1
        is_next = is_next and traced.clauses[before].sentence == clause.sentence
        is_kept = step.new & _PARTING == step.old & _PARTING
        if is_in_reach and is_next and not is_kept:
            return "a denial or a doubt could end sooner than in the note"
        if is_in_reach and not is_next and step.clause not in begun_anew:
            return "a denial or a doubt could reach further than in the note"
        is_in_reach = bool(clause.words & _SCOPES) or (is_in_reach and step.new.isdisjoint((";", ".", "but")))
        before = step.clause
    return ""


def verbs_keep_their_time(traced: _Traced) -> str:
    """What was is not told as what is, nor what is to be done as done or as the patient's doing."""
    present, past = _WORDS["present"], _WORDS["past"]
    for step in traced.steps:
        was, now = step.old & (present | past), step.new & (present | past)
        is_turned = was and now and bool(was & past) != bool(now & past)
        is_lost = (
            was
            and not now
            and not (step.begins and was <= present)
            and not (step.word[0].isdigit() or _PARTICIPLE.fullmatch(step.word))
        )
        if is_turned or is_lost:
            return "another tense than in the note"
        is_plan = traced.clauses[step.clause].is_plan
        if is_plan and (step.new - step.old) & (_AUXILIARY | _WORDS["subject"]):
            return "tells a plan as done, or as the patient's part"
        if step.word[0].isdigit() and ("in" in step.old) != ("in" in step.new):
            return "another time than in the note"
    return ""


def who_does_and_who_is_done_to_stay(traced: _Traced) -> str:
    """ "Advised" is not "she advised", nor "Oncology reviewed the scan" "oncology was reviewed"."""
    subject, be, content = _WORDS["subject"], _WORDS["be"], traced.source.content
    for step in traced.steps:
        old, new = step.old, step.new
        is_said = new & (_AUXILIARY | _WORDS["report"]) or step.word in _WORDS["own verbs"]
        if new & subject and not old & subject and not is_said:
            return "the patient for somebody else"
        if not _PARTICIPLE.fullmatch(step.word):
            continue
        is_last = step.index + 1 == traced.clauses[step.clause].last
        has_object = not is_last and content[step.index + 1] not in _WORDS["prepositions"]
        if (new & be and not old & be and (has_object or old & subject)) or (
            old & be and not new & be and new & subject
        ):
            return "active for passive, or the other way round"
    return ""


def man_or_woman_as_the_note_has_it(traced: _Traced) -> str:
    """No "he" for a woman, nor for a patient of whom the note does not say."""
    added = (set(traced.written.words) - set(traced.source.words)) & (_WORDS["male"] | _WORDS["female"])
    wrong = added - _WORDS.get(_sex(traced.note), frozenset()) if added else added
    return f"'{min(wrong)}' is not what the note says" if wrong else ""


RULES = (
    clauses_keep_their_heads,
    nothing_that_changes_it_is_dropped,
    labels_stay_labels,
    questions_stay_questions,
    it_reads_as_a_sentence,
    clauses_stay_apart,
    denials_and_doubts_keep_their_reach,
    verbs_keep_their_time,
    who_does_and_who_is_done_to_stay,
    man_or_woman_as_the_note_has_it,
)
