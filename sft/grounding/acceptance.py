"""Whether a written sentence can be traced to the part of the note that it was written from.

A sentence may stand if its content is whole clauses of the part: each word as often and in the order in which
it stands there, each clause at most once. Clauses may change places or be left out, light words come and go,
shorthand be spelled out. Whatever a rule cannot follow is refused: the note's own words stand instead, so
that a needless refusal costs style and nothing else. Time is linear in the length of the texts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sft.grounding import clauses as of
from sft.grounding.citations import strip_citations
from sft.grounding.clauses import AUXILIARY, BREAKS, PARTING, SCOPES, WORDS, Clause, Reading
from sft.grounding.parts import patient_line
from sft.grounding.reading import MARKERS
from sft.grounding.shorthand import key, spell_out, use_short_forms
from sft.grounding.structure import topic_of

_OPENING = re.compile(
    r"\s*(?:an?|the|this)?\s*(?:(\d{1,3}) yearold\s+)?(man|woman|lady|gentleman|male|female)\b", re.IGNORECASE
)
_SUBJECT = WORDS["subject"]
_CLOCK = re.compile(r"\d\d?:\d\d|\d+/\d+/\d{2,4}")
_STAMPED = WORDS["stamps"] | WORDS["times"]
_ANEW = frozenset((";", ".", "but")) | _SUBJECT | AUXILIARY
# The light words and marks before a word, in the order of English: ", and the patient has also had a"
_GAP = re.compile(
    r"(?:[^\w ] )*(?:(?:and|but|who|which) )?(?:[^\w ] )*"
    r"(?:(?:the )?(?:patients?|pt) |(?:he|she|they|there) )?"
    r"(?:also )?(?:(?:is|are|was|were|(?:has|have|had)(?: been| had)?|"
    r"report(?:s|ed)?|complains|present(?:s|ed|ing)|states?|stated) )?"
    r"(?:(?:also|of|in|on|at|with) )?(?:(?:an?|the|his|her) )?(?:[^\w ] )*"
)
# Of these a gap may have what the note has there
_KEPT = frozenset("still currently also while although though however their".split())
_DATES = {word for word, (kind, _) in MARKERS.items() if kind in ("weekday", "month", "when")}
_STARTS = WORDS["articles"] | _SUBJECT | frozenset('there still his her their ( " “'.split())

_NO_NAMES = WORDS["prepositions"] | WORDS["commands"]


@dataclass
class _Step:
    """One content word of the sentence: its clause and what stands before it, in the part and here."""

    number: int  # of the clause
    clause: Clause
    begins: bool
    word: str
    index: int  # in the part
    old: frozenset[str]
    new: frozenset[str]

    @property
    def added(self) -> frozenset[str]:
        return self.new - self.old


@dataclass
class _Traced:
    """A sentence laid beside its part."""

    source: Reading
    written: Reading
    clauses: list[Clause]
    kept: list[int]  # the clauses that it holds, in its order
    steps: list[_Step]
    sex: str  # of the patient


def accept(part: str, sentence: str, note: str, shorthand: Mapping[str, Sequence[str]] = {}) -> list[str]:
    """Why `sentence` may not stand for `part`, in a few words each; empty: it may.

    `part`: the note's words that it was written from; `note`: the whole note, for who the patient is;
    `shorthand`: what summaries say for the note's short forms (`learn_shorthand`)."""
    words = set(Reading(part, frozenset()).words)
    is_of_others = bool(words & of.OTHERS)
    free = WORDS["articles"] if is_of_others else of.FREE
    line = spell_out(patient_line(note))
    sentence = strip_citations(sentence)
    if not is_of_others:
        sentence = _shorten_opening(sentence, part, line)
    source, written = (Reading(use_short_forms(text, words, shorthand), free) for text in (part, sentence))
    if " ".join(source.words).rstrip(" .") == " ".join(written.words).rstrip(" ."):
        return []
    if not written.content:
        return ["says nothing of its part"]
    known = set(source.content)
    missing = next((word for word in written.content if word not in known), None)
    if missing is not None:
        return [f"not in the note at this place: '{missing}'"]
    clauses = of.read_clauses(part, source)
    kept = of.match_clauses(clauses, source.content, written.content)
    if kept is None:
        return ["words left out, added, doubled or moved inside a clause"]
    if is_of_others and kept != list(range(len(clauses))):
        return ["leaves out or moves what is said of or to others"]
    traced = _Traced(source, written, clauses, kept, _steps(source, written, clauses, kept), _sex(line))
    return [reason for rule in RULES if (reason := rule(traced))]


def _sex(line: str) -> str:
    """ "male" or "female" as the line says of the patient, "" if it does not."""
    words = set(map(key, re.findall(r"[a-z]+", line.lower())))
    found = [sex for sex in ("male", "female") if words & WORDS[sex]]
    return found[0] if len(found) == 1 else ""


def _shorten_opening(sentence: str, part: str, line: str) -> str:
    """ "A 60-year-old man" becomes "the patient" where the line says so and the part does not."""
    spelled = spell_out(sentence)
    opening = _OPENING.match(spelled)
    part = spell_out(part).lower()
    if not opening or "yearold" in part or opening[0].strip().lower() in part:
        return sentence
    is_same_age = opening[1] is None or f" {opening[1]} yearold " in line
    is_same = is_same_age and key(opening[2].lower()) in WORDS.get(_sex(line), ())
    return "The patient" + spelled[opening.end() :] if is_same else sentence


def _steps(source: Reading, written: Reading, clauses: list[Clause], kept: list[int]) -> list[_Step]:
    places = [(number, i) for number in kept for i in range(clauses[number].first, clauses[number].last)]
    steps = []
    for (number, i), new in zip(places, written.gaps, strict=False):
        clause = clauses[number]
        gaps = frozenset(source.gaps[i]), frozenset(new)
        steps.append(_Step(number, clause, i == clause.first, source.content[i], i, *gaps))
    return steps


def clauses_keep_their_heads(traced: _Traced) -> str:
    """A clause that leans on the one before it comes right after it."""
    for before, number in pairwise([-2, *traced.kept]):
        if traced.clauses[number].leans and before != number - 1:
            return "a clause stands without what it belongs to"
    return ""


def nothing_that_changes_it_is_dropped(traced: _Traced) -> str:
    """What is left out may not limit what stays. Of a sentence that stays, only another finding, a measured
    value or what somebody asks may go."""
    kept = set(traced.kept)
    sentences = {traced.clauses[number].sentence for number in kept}
    scopes = {clause.sentence for clause in traced.clauses if clause.words & SCOPES}
    for number, clause in enumerate(traced.clauses):
        guards = of.guards(clause.words)
        if number in kept or (not guards and (clause.sentence not in sentences or clause.label)):
            continue
        words = traced.source.content[clause.first : clause.last]
        if guards or clause.sentence in scopes or not _may_go(clause, words, traced):
            return f"leaves out '{min(guards, default=words[0])}', which belongs to what stays"
    return ""


def _may_go(clause: Clause, words: list[str], traced: _Traced) -> bool:
    """Whether a clause of these words, none of which guards, only adds to its sentence."""
    gap = set(traced.source.gaps[clause.first])
    if words[0][0].isdigit() and "of" in gap:
        return True
    # Not of "chronic kidney and heart disease", "sooner for fever" or "holding for bleeding"
    is_name = not any(
        word in _NO_NAMES or word.endswith("ing") or of.PARTICIPLE.fullmatch(word) for word in words[:-1]
    )
    if is_name and of.CONDITION.fullmatch(words[-1]) and gap.isdisjoint(("with", "in", "on", "at")):
        return len(words) == 1 or "and" not in gap
    # A second value of what stays may be the one that counts
    said = {word for number in traced.kept for word in traced.clauses[number].words}
    is_value = not clause.leans and of.MEASURE.fullmatch(" ".join(words)) and not gap & of.PLACES
    return bool(is_value and words[0] not in said) or (
        words[0] in ("asking", "wondering") and gap <= BREAKS | {"and"}
    )


def events_keep_their_order(traced: _Traced) -> str:
    """What happened or was done first is told first."""
    content = traced.source.content
    events = [
        number
        for number in traced.kept
        for word in content[traced.clauses[number].first : traced.clauses[number].last]
        if of.PARTICIPLE.fullmatch(word) or word in WORDS["own verbs"]
    ]
    return "" if events == sorted(events) else "tells events in another order"


def labels_stay_labels(traced: _Traced) -> str:
    """A label is no fact: it stands before its colon, or goes if it only names a part of the note."""
    place = {number: position for position, number in enumerate(traced.kept)}
    for number, clause in enumerate(traced.clauses):
        if not clause.label:
            continue
        labeled = [n for n in traced.kept if n > number and traced.clauses[n].sentence == clause.sentence]
        if number not in place:
            may_go = topic_of(clause.label) == "diagnosis" and clause.words.isdisjoint(
                ("ddx", "differential")
            )
            if labeled and not may_go:
                return f"leaves out the label '{clause.label}'"
        elif traced.kept[place[number] + 1 :][:1] != [number + 1] or any(
            place[n] < place[number] for n in labeled
        ):
            return f"parts the label '{clause.label}' from what it stands before"
    for step in traced.steps:
        if step.begins and step.clause.label and step.new & (AUXILIARY | _SUBJECT):
            return f"tells the label '{step.clause.label}' as a fact"
        label = traced.clauses[step.number - 1].label if step.begins and step.number - 1 in place else ""
        is_said = ":" in step.new or (topic_of(label) == "diagnosis" and step.new & WORDS["be"])
        if label and not is_said:
            return f"tells the label '{label}' as a fact"
    return ""


def questions_stay_questions(traced: _Traced) -> str:
    """What is only asked is not told."""
    ends = {clause.sentence: clause.last for clause in traced.clauses}
    if any("?" in traced.source.gaps[ends[traced.clauses[number].sentence]] for number in traced.kept):
        return "tells a question as a fact"
    return "asks what the note tells" if "?" in traced.written.words else ""


def it_reads_as_a_sentence(traced: _Traced) -> str:
    """Nothing dangles at its ends; the small words that show what belongs together stay."""
    gaps = traced.written.gaps
    if not _STARTS.issuperset(gaps[0][:1]) or any(word in of.FREE or word in ",;:" for word in gaps[-1]):
        return "begins or ends in the middle"
    for step in traced.steps:
        changed = ((step.old - step.new) | (step.added - {"of"})) & of.PLACES
        if (changed and step.word not in _DATES) or (
            step.index and step.added & _SUBJECT and not step.begins
        ):
            return "small words changed inside a clause"
    return ""


def small_words_stand_where_they_can(traced: _Traced) -> str:
    """No "with vomited", "a shift, of 4 mm", "walked but driving"; no "still" that the note lacks."""
    content = traced.source.content
    for step, new in zip(traced.steps, traced.written.gaps, strict=False):
        if new == traced.source.gaps[step.index]:
            continue
        before = content[step.index - 1] if step.index else ""
        is_verb = of.PARTICIPLE.fullmatch(step.word) or step.word in WORDS["own verbs"]
        no_with = is_verb or not step.begins or not step.index or "and" in step.old
        no_with = no_with or step.word in WORDS["prepositions"] | SCOPES - {"no"}
        # "2 weeks of pain", "shift of 4 mm", "weakness of the left arm"
        can_have_of = before in WORDS["times"] or step.word[0].isdigit() or step.word in ("left", "right")
        if (
            ({"with", "while"} & step.old - step.new and step.new.isdisjoint(WORDS["have"]))
            or ("with" in step.added and no_with)
            or ("of" in step.added and (step.old & BREAKS or not can_have_of))
            or (step.index and ":" in step.added and not traced.clauses[step.number - 1].label)
            or not _GAP.fullmatch("".join(f"{word} " for word in new if word not in step.old & _KEPT))
        ):
            return f"small words that do not go together before '{step.word}'"
        no_name = is_verb or step.word in of.NO_NOUNS
        if no_name and step.added & WORDS["articles"] & set(new[-1:]):
            return f"an article before '{step.word}'"
    return ""


def a_verb_is_added_where_there_is_none(traced: _Traced) -> str:
    """ "The wound is dry" and "there is no pain", not "high was sugar" or "75 was mg"."""
    verbs = {step.number for step in traced.steps if step.old & AUXILIARY}
    for step in traced.steps:
        if step.added & WORDS["be"] and (step.number in verbs or not _can_be(traced, step)):
            return f"a verb before '{step.word}'"
        if step.added & WORDS["be"] or of.PARTICIPLE.fullmatch(step.word):
            verbs.add(step.number)
    return ""


def _can_be(traced: _Traced, step: _Step) -> bool:
    """Whether "is" or "was" may be added before a word."""
    content = traced.source.content
    last, before = content[step.clause.last - 1], content[step.index - 1] if step.index else ""
    is_said = bool(of.PREDICATE.fullmatch(step.word) or of.STATE.fullmatch(step.word))
    if "there" in step.new:
        is_thing = (is_said and not of.PREDICATE.fullmatch(last)) or of.CONDITION.fullmatch(last)
        return bool(is_thing) or step.word in SCOPES | WORDS["prepositions"]
    if step.added & _SUBJECT:
        # only_a_condition_is_the_patients says whether
        return True
    if step.begins and step.index:
        is_of_patient = is_said and step.new & {"and", "but"} and _SUBJECT & set(traced.written.gaps[0])
        return bool(step.new & _SUBJECT or traced.clauses[step.number - 1].label or is_of_patient)
    is_preposition = step.word in WORDS["prepositions"]
    has_place = bool(step.new & of.PLACES - {"of"})
    # "Dating scan Thursday", "scans from 28 weeks": was it, or will it be?
    when = content[step.index + is_preposition] if step.index + is_preposition < len(content) else ""
    is_date = when in _DATES or (when[:1].isdigit() and (is_preposition or has_place))
    if ":" in when or (is_date and step.added & WORDS["past"]):
        return False
    is_said = is_said or is_date or step.word[0].isdigit() or has_place or is_preposition
    return is_said and before not in SCOPES | WORDS["prepositions"]


def clauses_stay_apart(traced: _Traced) -> str:
    """Where a clause ended, the sentence has a mark or a joining word; inside a clause it adds none."""
    before = None
    is_of_patient = bool(_SUBJECT & set(traced.written.gaps[0]))
    for step in traced.steps:
        named = before is not None and "yearold" in traced.clauses[before].words
        is_of_patient = is_of_patient or named
        can_have = step.added & _SUBJECT or step.old & (WORDS["report"] | WORDS["have"]) or named
        can_have = can_have or (is_of_patient and step.added & {"and", ","})
        if (step.added & WORDS["have"] and not can_have) or (step.added & {"who", "which"} and not named):
            return "has one thing have or be another"
        if not step.begins:
            if step.new & PARTING - {"\n"} and not step.old & (PARTING | WORDS["report"]):
                return "joins or parts words inside a clause"
            # "Recovery 14:10", "Bed 6": a stamp of place or time is no subject
            last = traced.source.content[step.index - 1]
            is_stamp = last in _STAMPED and step.word[0].isdigit()
            if step.added & AUXILIARY and (is_stamp or any(map(_CLOCK.fullmatch, (last, step.word)))):
                return "tells a place or a time as a fact"
            continue
        is_next = before == step.number - 1 and traced.clauses[before].sentence == step.clause.sentence
        needed = PARTING if is_next else BREAKS | {"and", "but", "while"}
        if is_next and traced.clauses[before].label:
            needed = needed | WORDS["be"]
        elif is_next and step.word[0].isdigit():
            needed = needed | {"of"}
        if before is not None and not needed & step.new:
            return "runs two clauses together"
        before = step.number
    return ""


def denials_and_doubts_keep_their_reach(traced: _Traced) -> str:
    """After "no", "possible" or "if" the words that join stay as they are, and what is new begins anew."""
    before, is_in_reach = None, False
    for step in traced.steps:
        if not step.begins:
            continue
        is_next = before == step.number - 1 and traced.clauses[before].sentence == step.clause.sentence
        if is_in_reach and (step.new & PARTING != step.old & PARTING if is_next else not step.new & _ANEW):
            return "a denial or a doubt could reach less or more than in the note"
        is_in_reach = bool(step.clause.words & SCOPES) or (
            is_in_reach and step.new.isdisjoint((";", ".", "but"))
        )
        before = step.number
    return ""


def verbs_keep_their_time(traced: _Traced) -> str:
    """What was is not told as what is, nor what is to be done as done or as the patient's doing."""
    for step in traced.steps:
        was, now = (
            {(w in WORDS["past"], w in WORDS["be"]) for w in gap & AUXILIARY} for gap in (step.old, step.new)
        )
        if was and was != now:
            return "another tense than in the note"
        if step.clause.is_plan and step.added & (AUXILIARY | _SUBJECT):
            return "tells a plan as done, or as the patient's part"
    return ""


def who_does_and_who_is_done_to_stay(traced: _Traced) -> str:
    """ "Advised" is not "she advised", nor "Oncology reviewed the scan" "oncology was reviewed"."""
    content = traced.source.content
    for step in traced.steps:
        is_said = step.new & (AUXILIARY | WORDS["report"]) or step.word in WORDS["own verbs"]
        if step.new & _SUBJECT and not step.old & _SUBJECT and not is_said:
            return "the patient for somebody else"
        if not of.PARTICIPLE.fullmatch(step.word):
            continue
        is_last = step.index + 1 == step.clause.last
        # "Extubated at 10:00", "admitted Monday", but "reviewed the scan"
        has_object = (
            not is_last
            and content[step.index + 1] not in WORDS["prepositions"] | _DATES
            and of.PLACES.isdisjoint(traced.source.gaps[step.index + 1])
        )
        becomes_passive = step.new & WORDS["be"] and not step.old & WORDS["be"]
        if becomes_passive and (has_object or step.old & _SUBJECT):
            return "active for passive"
    return ""


def only_a_condition_is_the_patients(traced: _Traced) -> str:
    """ "Fever" may become "she has fever"; "loose slippers" and "no tampons for 5 days" may not."""
    content, gaps = traced.source.content, traced.source.gaps
    ends = of.PLACES | WORDS["prepositions"] | {"with"}
    for step in traced.steps:
        if not (step.added & _SUBJECT and step.added & (AUXILIARY | WORDS["report"])):
            continue
        last = step.index + 1
        while last < step.clause.last and not ends & {content[last], *gaps[last]}:
            last += 1
        is_state = bool(step.added & WORDS["be"])
        is_known = (of.STATE if is_state else of.CONDITION).fullmatch(content[last - 1])
        # "Observations stable"
        is_broken = is_state and last - step.index > 1
        if not is_known or is_broken or not SCOPES.isdisjoint(content[step.index + 1 : step.clause.last]):
            return f"gives '{content[last - 1]}' to the patient"
    return ""


def man_or_woman_as_the_note_has_it(traced: _Traced) -> str:
    """No "he" for a woman, nor for a patient of whom the note does not say."""
    added = (set(traced.written.words) - set(traced.source.words)) & (WORDS["male"] | WORDS["female"])
    wrong = added - WORDS.get(traced.sex, frozenset())
    return f"'{min(wrong)}' is not what the note says" if wrong else ""


RULES = (
    clauses_keep_their_heads,
    nothing_that_changes_it_is_dropped,
    events_keep_their_order,
    labels_stay_labels,
    questions_stay_questions,
    it_reads_as_a_sentence,
    small_words_stand_where_they_can,
    a_verb_is_added_where_there_is_none,
    clauses_stay_apart,
    denials_and_doubts_keep_their_reach,
    verbs_keep_their_time,
    who_does_and_who_is_done_to_stay,
    only_a_condition_is_the_patients,
    man_or_woman_as_the_note_has_it,
)
