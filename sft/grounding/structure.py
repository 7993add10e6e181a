"""How a clinical note is laid out: what each of its sentences is, and what it stands under.

A sentence of a note may make sense only under its heading, label, speaker or question, or after the sentence
that it refers back to. `read_units` finds these, so that a sentence can be quoted together with them.
"""

import functools
import itertools
import re
from dataclasses import dataclass, replace

from sft.grounding.sentences import sentence_spans

_BULLET = re.compile(r"\s*(?:[-•*–·▪>]+\s+|\(?\d{1,2}[.)]\s+|[-•*–·▪](?=\w))")
_LABEL = re.compile(
    r"""(?P<time>\d\d?[:.]\d\d(?:h|hrs)?)\s+(?=[A-Z])|["“']?(?!(?:He|She|It|They|We|I|There|This)\b)(?P<label>[A-Z?][\w/&?'’.-]*(?:[ \t]+[\w/&()'’-]+){0,3})\s*:(?=\s|$)\s*"""
)
_SALUTATION = re.compile(
    r"(?:dear\b|hi\b|hello\b|good (?:morning|afternoon|evening)|(?:kind|best|warm|with)?\s*(?:regards|wishes)|"
    r"yours\b|sincerely|thank|many thanks|signed\b|to whom|cc\b|dictated|electronically|it was (?:a pleasure|nice))",
    re.IGNORECASE,
)
# What a label or heading announces; S, O, A, P and the like are spelled out or dropped by TEXT_OF_LABEL
_KINDS = {
    "plan": r"p|plans?|advice|advised?|rx|treatment( plan)?|medical treatment|additional testing|outcome|management|"
    r"specialist referrals?|recommend(ed|ations?)?|follow.?up|f/?u|suggest(ed|ions?)?|instructions?|disposition|"
    r"actions?|to.?do|next( steps?)?|rec|agreed|decisions?|do(ne)?( today)?|overnight|discharge plan",
    "diagnosis": r"a|imp|impression|assessment|ax|d?dx|diagnos[ie]s|conclusions?|opinion|summary|comment|"
    r"(final|working) diagnosis|interpretation",
    "result": r"results?|findings?|path(ology)?|report|.*results",
    "plan diagnosis": r"a/p|a ?& ?p|a and p|assessment (and|&) plan|impression (and|&) plan",
    "reason": r"reason.*|indication|clinical details|problem|pc|cc|c/o|chief complaint|question|presenting.*|"
    r"hp[ci]|history of presen.*|s|subjective|admitted (with|for)|referral",
    "operation": r"operation|procedures?|op(eration)? performed|op|surgery|proc|specimens?",
    "drugs": r"((current|home|regular) )?(medications?|medicines|meds|drugs)|dh",
    "family": r"f/?hx?|family history|s/?hx?|social( history)?",
    "exam": r".*exam(ination)?|vital.*",
    "review": r"ros|review of systems|systems review",
}
_KIND = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _KINDS.items()}
# Labels that only say which part of the note this is: left out of a quotation
_SILENT = re.compile(
    r"s|o|hp[ci]|c/o|subjective|objective|history|history of presen.*|presenting.*|"
    r"medical (reasoning|treatment)|additional testing|specialist referrals?|patient (education|agreements).*|"
    r"assessment (and|&) plan|a/p|results?|instructions?|vitals.*|physical exam.*|exam(ination)?|findings?",
    re.IGNORECASE,
)
SPELLED_OUT = {"p": "Plan", "a": "Assessment", "imp": "Impression", "rx": "Treatment", "dx": "Diagnosis"}
SPELLED_OUT |= {"cc": "Chief complaint", "pc": "Presenting complaint"}
_FIRST_AGAIN = re.compile(
    r"(?:it|its|this|that|these|those|they|them|their|both|neither|either|same|also|then|thereafter|"
    r"otherwise|however|but|(?:a )?similar|which|instead|again|nothing|none|another|later|not|never|afterward|afterwards|meanwhile|"
    r"the (?:same|latter|former|other|others|rest)|one (?:of|is|was|had|has)|so|and|or|if (?:so|not)|"
    r"(?:stopped|settled|resolved|improved|repeated|continued|restarted|changed|removed|done|given|seen) "
    r"(?:there|then|here|after|again|by|at once|since|in|with|on))\b",
    re.IGNORECASE,
)
# "To repeat it at 21:00", "We have asked for one within a month"; not "We think it is gout"
_OBJECT_AGAIN = re.compile(
    r"(?:[a-z']+ ){1,4}?(?:(?:it|them)(?! \w+s\b| (?:may|might|would|will|could|had|can)\b)|one(?= (?:within|in|at|by|before)\b|[.,;]|$))\b",
    re.IGNORECASE,
)
# "This 44-year-old man" and "This is a 26-year-old" name the patient and refer to nothing
_NAMES_PATIENT = re.compile(
    r"(?:\b\d{1,3}[\s-]*(?:year|yr|y/?o\b|y\b|[MF]\b)|\b\d{1,3}[\s-]*(?:month|week|day|hour)s?[\s-]old|\b[MF]\s?\d\d\b|"
    r"\b\d+/(?:12|52) (?:girl|boy|baby|[MF]\b)|\baged \d|\b(?:he|she|man|lady|gentleman) is \d\d\b|\b(?:boy|girl|man|woman) of \d|\b(?:male|female), \d\d|"
    r"\bborn (?:at )?\d\d\b|this (?:is|patient|lady|gentleman|man|woman|boy|girl|baby))",
    re.IGNORECASE,
)
KIN = re.compile(
    r"\b(?:mother|father|mum|mom|dad|sister|brother|son|daughter|wife|husband|partner|cousin|aunt|uncle|sibling|"
    r"grand\w+|niece|nephew|neighbou?r|donor|housemates?|flatmate|carer)s?\b",
    re.IGNORECASE,
)
_DENIES = re.compile(r"(?:no|normal|good|within)\b", re.IGNORECASE)
_TOKEN = re.compile(r"[a-z]+|\d+(?:[.,:/]\d+)*")
_STOP = frozenset(
    "a an the and or but of in on at to for from with by as is are was were be been has have had he she it they his her "
    "their its this that these those there then than which who whom we i you me my our your us them him not no nor if so "
    "do does did will would can could should may might also about after before over into per patient presents present today reports states complaints".split()
)


@dataclass(frozen=True)
class Unit:
    """One sentence of a note and what it stands under."""

    number: int  # 1-based, as sentence_spans counts
    text: str  # without bullet and label, on one line
    label: str  # its label, or that of the line it continues
    label_number: int  # the sentence that holds the label; 0: none
    heading: int  # the sentence that is its nearest heading; 0: none
    asked: int  # the question that it answers; 0: none
    needs: int  # the sentence that it refers back to; 0: none
    kind: str  # "sentence", "heading", "question" or "salutation"
    topic: str  # of its label or heading: plan, diagnosis, reason, operation, family, review, end, or ""
    names_patient: bool
    listed: int = 0  # the sentence that begins its list of bullets; 0: none


def content_stems(text: str) -> list[str]:
    """The stems of the words that say something, and the numbers, in order."""
    words = _TOKEN.findall(text.lower())
    return [stem(word) for word in words if word not in _STOP and (len(word) > 1 or word.isdigit())]


@functools.lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """ "lesions", "started" -> "lesion", "start"; six letters at most."""
    return re.sub(r"(?<=...)(?:ings?|ed|es|s|ly|ies|y|e)$", "", word)[:6] if word[0].isalpha() else word


def topic_of(label: str) -> str:
    """What a label or heading announces; "" if it is none of these."""
    return next((kind for kind, pattern in _KIND.items() if pattern.fullmatch(label.strip(" :.?"))), "")


def shown_label(label: str) -> str:
    """The label as a reader wants it; "" for one that says only which part of a note this is."""
    bare = label.strip(" :.")
    if _SILENT.fullmatch(bare):
        return ""
    bare = SPELLED_OUT.get(bare.lower(), bare)
    # "PAST MEDICAL HISTORY", but "PMH" and "CT KUB"
    return bare.capitalize() if bare.isupper() and (len(bare) > 12 or topic_of(bare)) else bare


def read_units(note: str) -> list[Unit]:
    """Every sentence of the note, in order. Linear in the note's length."""
    lines = _lines(note)
    units = []
    label, label_number, section, problem, question = "", 0, 0, 0, 0
    problem_bulleted = False
    own_label = False
    names = {}
    last_with = {}
    for i, (text, gap, after) in enumerate(lines):
        number = i + 1
        bullet = _BULLET.match(text)
        body = text[bullet.end() :] if bullet else text
        starts_line = gap > 0 or i == 0
        # A label in the middle of a line is its sentence's own
        if starts_line or own_label:
            label, label_number, own_label = "", 0, False
        if gap > 1 or (problem_bulleted and starts_line and not bullet):
            problem = 0
        heading_kind = starts_line and after and _heading_kind(lines, i, body, names.get(section, ""))
        # With nothing below it, it is no sentence either
        if i == len(lines) - 1 > 0 and starts_line and topic_of(body):
            heading_kind = "section"
        if heading_kind:
            section = number if heading_kind == "section" else section
            problem = number if heading_kind == "problem" else 0
            problem_bulleted = bool(i + 1 < len(lines) and _BULLET.match(lines[i + 1][0]))
            names[number] = body.rstrip(":. ")
            units.append(
                Unit(number, names[number], "", 0, 0, 0, 0, "heading", topic_of(names[number]), False)
            )
            question = 0
            continue
        found, body = _take_label(body, starts_line)
        if found:
            label, label_number = found, number
            own_label = not starts_line and not topic_of(label)
        heading = problem or section
        topic = topic_of(label) or topic_of(names.get(problem, "")) or topic_of(names.get(section, ""))
        kind = _kind(body, topic)
        named = _NAMES_PATIENT.search(text)
        # "8-year-old boy, mother in the room", but not "Her sister is a 30-year-old nurse"
        names_patient = bool(named) and not KIN.search(text[max(0, named.start() - 15) : named.start()])
        asked = question if kind == "sentence" and (not starts_line or i == question) else 0
        needs = 0 if starts_line and bullet else _refers_to(body, units, last_with)
        # "My sister had one. Me, never." and "X-ray of the knee is unremarkable. No fractures."
        goes_on = bool(units) and (units[-1].asked or (topic == "result" and _DENIES.match(body)))
        if goes_on and not starts_line and len(body.split()) <= 4:
            needs = needs or number - 1
        needs = 0 if needs == asked else needs
        before = units[-1].listed if units else 0
        listed = (before or number) if starts_line and bullet else 0 if starts_line else before
        units.append(
            Unit(number, body, label, label_number, heading, asked, needs, kind, topic, names_patient, listed)
        )
        question = number if kind == "question" else 0
        for word in content_stems(body):
            last_with[word] = number
    return _mark_the_end(units)


def _mark_the_end(units: list[Unit]) -> list[Unit]:
    """Bullets without heading in a note's second half get the topic "end": perhaps its plan.

    A line or two may follow them, "Both parents told.".
    """
    last = next((unit for unit in reversed(units[-3:]) if unit.listed), None)
    if not last or last.topic or last.heading in range(len(units) // 2, len(units) + 1):
        return units
    first = max(last.listed, len(units) // 2 + 1)
    return [
        replace(unit, topic="end") if first <= unit.number <= last.number and not unit.topic else unit
        for unit in units
    ]


def _take_label(body: str, starts_line: bool) -> tuple[str, str]:
    """The label or time that a sentence begins with, "" if none, and the rest, out of its quotation marks."""
    found = _LABEL.match(body)
    label = ""
    if found and starts_line and found["time"]:
        label = found["time"]
    elif found and found["label"] and found.end() <= 45 and not re.search(r"\d{2}", found["label"]):
        label = found["label"]
    body = body[found.end() :] if label else body
    is_whole = body[:1] in '"“' and body[-1:] in '"”'
    is_cut = body.count('"') % 2 or body.count("“") != body.count("”")
    return label, body.strip(' "“”') if is_whole or is_cut else body


def _lines(note: str) -> list[tuple[str, int, int]]:
    """(sentence on one line, line breaks before it, line breaks after it) for every sentence."""
    spans = sentence_spans(note)
    physical = [len(line.rstrip()) for line in note.split("\n") if line.strip()]
    wrapped = (
        len(physical) > 3 and max(physical) <= 100 and sum(n >= 60 for n in physical) > len(physical) / 2
    )
    gaps = [0] if spans else []
    for (_, end), (start, _) in itertools.pairwise(spans):
        breaks = note.count("\n", end, start)
        blank = breaks > 1
        # In a note with wrapped lines, a full line's end is no line's end
        width = end - note.rfind("\n", 0, end) - 1
        is_wrap = wrapped and width >= 50 and breaks == 1 and not _BULLET.match(note[start : start + 6])
        gaps.append(2 if blank else 0 if is_wrap else breaks)
    texts = [" ".join(note[start:end].split()) for start, end in spans]
    return list(zip(texts, gaps, [*gaps[1:], 0], strict=False))


def _heading_kind(lines: list, i: int, body: str, section: str) -> str:
    """ "section", "problem" or "": whether the line `body` heads what follows."""
    body = body.strip('"“” ')
    words = body.split()
    following = lines[i + 1][0]
    bullet_follows = bool(_BULLET.match(following))
    bare = body.rstrip(":. ")
    if (
        len(words) > (12 if bullet_follows else 8)
        or not words
        or body[-1] in "?!;,"
        or _SALUTATION.match(body)
    ):
        return ""
    has_digits = any(c.isdigit() for c in body)
    if body.endswith(":") or (bare.isupper() and len(bare) > 3 and body[-1] != "." and not has_digits):
        # "COPD" above its bullets is a problem of the plan, "VITALS" is a section
        is_section = bare.isupper() and not (bullet_follows and lines[i][2] == 1 and topic_of(section))
        return "section" if topic_of(bare) or is_section else "problem"
    if topic_of(bare) and body[-1] != ".":
        return "section"
    # "Acute lumbar strain." above its bullets or lines, in an assessment or a plan
    is_numbered_or_apart = lines[i][1] > 1 or re.match(r"\s*\(?\d", lines[i][0])
    is_bulleted = _BULLET.match(lines[i][0]) and not re.match(r"\s*\(?\d", lines[i][0])
    if is_bulleted or lines[i][2] < 1 or i == 0 or (has_digits and not bullet_follows):
        return ""
    is_list = bool(re.match(r"\s*\(?\d", lines[i][0])) and bool(re.match(r"\s*\(?\d", following))
    if (
        lines[i][2] == 1
        and re.search("plan|diagnosis", topic_of(section))
        and is_numbered_or_apart
        and not is_list
    ):
        return "problem" if bullet_follows or len(following.split()) > len(words) else ""
    # "Genitourinary" above "No tenderness."
    is_title = len(words) <= 3 and (following[-1] == "." or ":" in following) and topic_of(section) != "drugs"
    is_above = (bullet_follows and len(words) <= 5) or is_title
    return "problem" if is_above and not re.search(r"\.$|:", body) and not _BULLET.match(lines[i][0]) else ""


def _kind(body: str, topic: str) -> str:
    if not re.search(r"\w", body):
        return "heading"
    if _SALUTATION.match(body) and (len(body.split()) <= 7 or not re.search(r"\d", body)):
        return "salutation"
    asks = body.rstrip("\"”'’) ").endswith("?")
    return "question" if asks and "diagnosis" not in topic else "sentence"


def _refers_to(body: str, units: list[Unit], last_with: dict[str, int]) -> int:
    """The sentence that this one refers back to; 0: none."""
    previous = units[-1].number if units and units[-1].kind in ("sentence", "question") else 0
    if _NAMES_PATIENT.search(body[:40]):
        return 0
    if _FIRST_AGAIN.match(body) or _OBJECT_AGAIN.match(body):
        return previous
    # "Her sister takes lithium. She has ...": who, is said before
    if (
        previous
        and re.match(
            r"(?:he|she|his|her)\b(?! (?:was|has been|is to be) \w+(?:ed|en)\b)", body, re.IGNORECASE
        )
        and KIN.search(units[-1].text[:40])
    ):
        return previous
    # "The ovary was ...": which, is said where it was last named
    definite = re.match(r"the (\w+)", body, re.IGNORECASE)
    if definite and definite[1].lower() not in ("patient", "plan"):
        near = last_with.get(stem(definite[1].lower()), 0)
        return near if near and near >= len(units) - 3 else 0
    return 0
