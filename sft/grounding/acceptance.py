"""Whether a written sentence can be traced to the part of the note that it was written from.

A sentence may stand if its content is whole clauses of the part: each word as often and in the order in which
it stands there, each clause at most once. Clauses may change places or be left out, light words come and go,
shorthand be spelled out. Whatever a rule cannot follow is refused: the note's own words stand instead, so
that a needless refusal costs style and nothing else. Time is linear in the length of the texts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sft.grounding.citations import strip_citations
from sft.grounding.clauses import (
    AUXILIARY,
    BREAKS,
    CONDITION,
    FREE,
    GUARDS,
    OTHERS,
    PARTICIPLE,
    PARTING,
    PLACES,
    SCOPES,
    STATE,
    WORDS,
    Clause,
    Reading,
    match_clauses,
    read_clauses,
)
from sft.grounding.parts import patient_line
from sft.grounding.reading import CONDITIONS, MARKERS
from sft.grounding.shorthand import key, spell_out, use_short_forms
from sft.grounding.structure import shown_label, topic_of
from sft.grounding.words import TOKEN

_OPENING = re.compile(
    r"\s*(?:an?|the|this)?\s*(?:(\d{1,3}) yearold\s+)?(man|woman|lady|gentleman|male|female)\b", re.IGNORECASE
)
_ANEW = frozenset((";", ".", "but")) | WORDS["subject"] | AUXILIARY


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

    source: Reading
    written: Reading
    clauses: list[Clause]
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
    words = set(Reading(part, frozenset()).words)
    is_strict = bool(words & OTHERS)
    free = WORDS["articles"] if is_strict else FREE
    sentence = strip_citations(sentence)
    if not is_strict:
        sentence = _shorten_opening(sentence, part, note)
    source, written = (Reading(use_short_forms(text, words, shorthand), free) for text in (part, sentence))
    if " ".join(source.words).rstrip(" .") == " ".join(written.words).rstrip(" ."):
        return []
    if not written.content:
        return ["says nothing of its part"]
    known = set(source.content)
    missing = next((word for word in written.content if word not in known), None)
    if missing is not None:
        return [f"not in the note at this place: '{missing}'"]
    clauses = read_clauses(part, source)
    kept = match_clauses(clauses, source.content, written.content)
    if kept is None:
        return ["words left out, added, doubled or moved inside a clause"]
    traced = _Traced(source, written, clauses, kept, _steps(source, written, clauses, kept), is_strict, note)
    return [reason for rule in RULES if (reason := rule(traced))]


def _sex(note: str) -> str:
    """ "male" or "female" as the note says of its patient, "" if it does not."""
    for text in (patient_line(note), note):
        sentences = [TOKEN.findall(one) for one in re.split(r"[.;\n]", spell_out(text).lower())]
        words = {key(word) for one in sentences if OTHERS.isdisjoint(one) for word in one}
        found = [sex for sex in ("male", "female") if words & WORDS[sex]]
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
    is_same_sex = key(opening[2].lower()) in WORDS.get(_sex(note), ())
    is_same = is_same_sex and (opening[1] is None or ages[:1] == [opening[1]])
    return "The patient" + spelled[opening.end() :] if is_same else sentence


def _steps(source: Reading, written: Reading, clauses: list[Clause], kept: list[int]) -> list[_Step]:
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
        guards = clause.words & (GUARDS if clause.sentence in sentences else WORDS["undone"])
        # After another person, "he" may be that one
        guards |= clause.words & OTHERS if number < max(traced.kept) else frozenset()
        if guards:
            return f"leaves out '{min(guards)}'"
        if clause.sentence not in sentences or clause.label:
            continue
        # "In pregnancy, BP 160/90" and "warfarin 5 mg Monday, 3 mg Tuesday"
        first, gap = traced.source.content[clause.first], set(traced.source.gaps[clause.first])
        is_setting = number + 1 in kept and (gap & {"in", "on", "at"} or first in WORDS["prepositions"])
        # "If febrile and neutropenic", "no rash with fever"
        scopes = traced.clauses[number - 1].words & SCOPES if number - 1 in kept else frozenset()
        if clause.leans and scopes and (scopes & CONDITIONS or "," not in gap):
            return f"leaves out what belongs to '{min(scopes)}'"
        # "Lipids and prolactin sent": the end may belong to both
        is_shared = number - 1 in kept and clause.leans and gap == {"and"} and clause.last - clause.first > 1
        if is_shared and not any(
            AUXILIARY & set(one) for one in traced.source.gaps[clause.first : clause.last]
        ):
            return f"leaves out '{first}', and perhaps the end of what stays"
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
        if labeled and number not in place and not _is_silent(traced, clause):
            return f"leaves out the label '{clause.label}'"
        is_moved = any(place[n] < place.get(number, -1) for n in labeled)
        if is_moved or (number in place and traced.kept[place[number] + 1 :][:1] != [number + 1]):
            return f"parts the label '{clause.label}' from what it stands before"
    for step in traced.steps:
        if step.begins and traced.clauses[step.clause].label and step.new & (AUXILIARY | WORDS["subject"]):
            return f"tells the label '{traced.clauses[step.clause].label}' as a fact"
        label = traced.clauses[step.clause - 1].label if step.begins and step.clause else ""
        is_said = ":" in step.new or (topic_of(label) == "diagnosis" and step.new & WORDS["be"])
        if label and step.clause - 1 in place and not is_said:
            return f"tells the label '{label}' as a fact"
    return ""


def _is_silent(traced: _Traced, clause: Clause) -> bool:
    """Whether a label may go: it only names a part of the note, or it is a time."""
    topic = topic_of(clause.label)
    if "plan" in topic:
        # "Plan: insulin" is a plan by its label alone
        return traced.source.content[clause.last] in WORDS["commands"]
    if clause.words & {"question", "differential", "ddx"}:
        return False
    names_part = topic in ("diagnosis", "reason", "result", "exam")
    return names_part or not shown_label(clause.label) or bool(re.match(r"\d+[:.]", clause.label))


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
    starts = WORDS["articles"] | WORDS["subject"] | first.old | set('there his her their ( " “'.split())
    if not starts.issuperset(traced.written.gaps[0][:1]) or any(
        word in FREE or word in ",;:" for word in last
    ):
        return "begins or ends in the middle"
    if any(one == two and one.isalpha() for gap in traced.written.gaps for one, two in pairwise(gap)):
        return "says a word twice"
    if any(sum(word in WORDS["subject"] for word in gap) > 1 for gap in traced.written.gaps):
        return "names two at once"
    for step in traced.steps:
        gone, added = (step.old - step.new) & PLACES, (step.new - step.old) & (PLACES | WORDS["subject"])
        is_date = step.word[0].isdigit() or MARKERS.get(step.word, ("",))[0] in ("weekday", "month")
        if step is not first and not is_date and (gone or (added - {"of"} and not step.begins)):
            return "small words changed inside a clause"
    return ""


def clauses_stay_apart(traced: _Traced) -> str:
    """Where a clause ended, the sentence has a mark or a joining word; inside a clause it adds none."""
    before = None
    is_of_patient = bool(WORDS["subject"] & set(traced.written.gaps[0]))
    for step in traced.steps:
        named = before is not None and "yearold" in traced.clauses[before].words
        is_of_patient = is_of_patient or named
        added = step.new - step.old
        can_have = step.new & WORDS["subject"] or step.old & (WORDS["report"] | WORDS["have"]) or named
        can_have = can_have or before is None or (is_of_patient and added & {"and", ","})
        if (added & WORDS["have"] and not can_have) or (added & {"who", "which"} and not named):
            return "has one thing have or be another"
        if not step.begins:
            if step.new & PARTING - {"\n"} and not step.old & (PARTING | WORDS["report"]):
                return "joins or parts words inside a clause"
            continue
        is_next = before is not None and before == step.clause - 1
        is_same = is_next and traced.clauses[before].sentence == traced.clauses[step.clause].sentence
        needed = PARTING if is_same else BREAKS | {"and", "but", "while"}
        if is_same and traced.clauses[before].label:
            needed = needed | WORDS["be"]
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
        is_kept = step.new & PARTING == step.old & PARTING
        if is_in_reach and is_next and not is_kept:
            return "a denial or a doubt could end sooner than in the note"
        if is_in_reach and not is_next and step.clause not in begun_anew:
            return "a denial or a doubt could reach further than in the note"
        is_in_reach = bool(clause.words & SCOPES) or (is_in_reach and step.new.isdisjoint((";", ".", "but")))
        before = step.clause
    return ""


def verbs_keep_their_time(traced: _Traced) -> str:
    """What was is not told as what is, nor what is to be done as done or as the patient's doing."""
    present, past = WORDS["present"], WORDS["past"]
    for step in traced.steps:
        was, now = step.old & (present | past), step.new & (present | past)
        is_turned = was and now and bool(was & past) != bool(now & past)
        is_lost = (
            was
            and not now
            and not (step.begins and was <= present)
            and not (step.word[0].isdigit() or PARTICIPLE.fullmatch(step.word))
        )
        if is_turned or is_lost:
            return "another tense than in the note"
        is_plan = traced.clauses[step.clause].is_plan
        if is_plan and (step.new - step.old) & (AUXILIARY | WORDS["subject"]):
            return "tells a plan as done, or as the patient's part"
        if step.word[0].isdigit() and ("in" in step.old) != ("in" in step.new):
            return "another time than in the note"
    return ""


def who_does_and_who_is_done_to_stay(traced: _Traced) -> str:
    """ "Advised" is not "she advised", nor "Oncology reviewed the scan" "oncology was reviewed"."""
    subject, be, content = WORDS["subject"], WORDS["be"], traced.source.content
    for step in traced.steps:
        old, new = step.old, step.new
        is_said = new & (AUXILIARY | WORDS["report"]) or step.word in WORDS["own verbs"]
        if new & subject and not old & subject and not is_said:
            return "the patient for somebody else"
        if not PARTICIPLE.fullmatch(step.word):
            continue
        is_last = step.index + 1 == traced.clauses[step.clause].last
        has_object = not is_last and content[step.index + 1] not in WORDS["prepositions"]
        if (new & be and not old & be and (has_object or old & subject)) or (
            old & be and not new & be and new & subject
        ):
            return "active for passive, or the other way round"
    return ""


def only_a_condition_is_the_patients(traced: _Traced) -> str:
    """ "Fever" may become "she has fever"; "loose slippers" and "no tampons for 5 days" may not."""
    content, gaps = traced.source.content, traced.source.gaps
    ends = PLACES | WORDS["prepositions"] | {"with"}
    for step in traced.steps:
        added = step.new - step.old
        # "Denies" and "reports" say whose it is
        if not (added & WORDS["subject"] and added & AUXILIARY) or step.old & WORDS["report"]:
            continue
        clause = traced.clauses[step.clause]
        last = step.index + 1
        while last < clause.last and not ends & {content[last], *gaps[last]}:
            last += 1
        # "Three weeks of pain"
        if content[last - 1] in WORDS["times"] and last < clause.last:
            last += 1
        is_person = "yearold" in clause.words or clause.words & {"man", "woman"}
        known = STATE if added & WORDS["be"] else CONDITION
        is_known = known.fullmatch(content[last - 1]) or (is_person and known is STATE)
        # "Ultrasound shows no stones": another sentence begins inside
        is_broken = any(AUXILIARY & set(gap) for gap in gaps[step.index + 1 : last])
        is_broken = is_broken or not SCOPES.isdisjoint(content[step.index + 1 : last])
        # "Not yet fit", but not "observations stable"
        others = {
            word for word in content[step.index : last - 1] if not re.fullmatch(r"not?|yet|now|\w+ly", word)
        }
        is_broken = is_broken or bool(known is STATE and not is_person and others)
        if not is_known or is_broken or clause.words & CONDITIONS:
            return f"gives '{content[last - 1]}' to the patient"
    return ""


def man_or_woman_as_the_note_has_it(traced: _Traced) -> str:
    """No "he" for a woman, nor for a patient of whom the note does not say."""
    added = (set(traced.written.words) - set(traced.source.words)) & (WORDS["male"] | WORDS["female"])
    wrong = added - WORDS.get(_sex(traced.note), frozenset()) if added else added
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
    only_a_condition_is_the_patients,
    man_or_woman_as_the_note_has_it,
)
