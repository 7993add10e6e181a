"""How a clinical note is laid out: what each of its sentences is, and what it stands under.

A sentence of a note may make sense only under its heading, label, speaker or question, or after the sentence
that it refers back to. `read_units` finds these, so that a sentence can be quoted together with them."""

import itertools
import re
from dataclasses import dataclass

from sft.grounding.lines import wrapped_newlines
from sft.grounding.sentences import sentence_spans
from sft.grounding.shorthand import spell_out
from sft.grounding.words import content_stems, stem

_NUMBER = r"\(?\d{1,2}[.)]\s+"
_BULLET = re.compile(rf"\s*(?:[-•*–·▪>]+\s+|{_NUMBER}|[-•*–·▪](?=\w))")
_LABEL = re.compile(
    r"""(?P<time>\d\d?[:.]\d\d(?:h|hrs)?)\s+(?=[A-Z])|["“']?(?!(?:He|She|It|They|We|I|There|This)\b)(?P<label>[A-Z?][\w/&?'’.-]*(?:[ \t]+[\w/&()'’-]+){0,3})\s*:(?=\s|$)\s*"""
)
_SALUTATION = re.compile(
    r"(?:dear\b|hi\b|hello\b|good (?:morning|afternoon|evening)|(?:(?:kind|best|warm|with|many)\s+)*(?:regards|wishes)|"
    r"yours\b|sincerely|thank|many thanks|signed\b|to whom|cc\b|dictated|electronically|it was (?:a pleasure|nice)|"
    # Page ends, signatures and what mail programs add
    r"page \d+ of \d+\W*$|(?:bleep|gmc|ext|hosp(?:ital)? (?:no|number)|mrn)[ :.]{1,3}[A-Z]?\d[\w/-]{0,20}\W?$|sent from my|this e-?mail\b|"
    r"if you are not the intended|printed (?:on |by )?[\d/: ]+$|(?-i:(?:CT|ST|FY)\d(?: [A-Z]\w+)*$|"
    r"(?:Dr|Prof)\.?(?: [A-Z][a-z.'-]*){1,3}(?:,? (?:CT|ST|FY|MD|FRC|MRC)\w*(?: \w+)?)?\W*$))",
    re.IGNORECASE,
)
# "Right eye   Left eye" above the columns of a table
_SIDES = re.compile(
    r"(?:\b(?:right|left|R|L|RE|LE|O[DS])\b(?: (?:eye|ear|side|hand|arm|leg|knee|foot))?[\s|/]*){2}",
    re.IGNORECASE,
)
# Labels of who and where, not of what is the matter
_ADDRESS = re.compile(
    r"(?:patient |full )?name|mrn|nhs (?:no|number)|hosp(?:ital)? (?:no|number)|dob|date of birth|tel|"
    r"(?:electronically |e-)?signed(?: by)?|dictated(?: by)?|secretary|gmc",
    re.IGNORECASE,
)
_MAIL = re.compile(r"from|to|sent|date|cc", re.IGNORECASE)
_CLOSING = re.compile(r"\b(?:regards|wishes|yours|sincerely)\b", re.IGNORECASE)
# What a label or heading announces
_TOPICS = {
    "plan": r"p|plans?|advice|advised?|rx|treatment( plan)?|medical treatment|additional testing|outcome|management|"
    r"specialist referrals?|recommend(ed|ations?)?|follow.?up|f/?u|suggest(ed|ions?)?|instructions?|disposition|"
    r"actions?|to.?do|next( steps?)?|rec|agreed|decisions?|do(ne)?( today)?|overnight|discharge plan",
    "diagnosis": r"a|imp|impression|assessment|ax|d?dx|diagnos[ie]s|conclusions?|opinion|summary|comment|"
    r"(final|working) diagnosis|interpretation",
    "result": r"results?|findings?|path(ology)?|report|[^:]*results",
    "plan diagnosis": r"a/p|a ?& ?p|a and p|(assessment|impression) (and|&) plan",
    "reason": r"reason[^:]*|indication|clinical details|problem|pc|cc|c/o|chief complaint|question|presenting[^:]*|"
    r"hp[ci]|history of presen[^:]*|s|subjective|admitted (with|for)|referral",
    "operation": r"operation|procedures?|op(eration)? performed|op|surgery|proc|specimens?",
    "drugs": r"((current|home|regular) )?(medications?|medicines|meds|drugs)|dh",
    "family": r"f/?hx?|family history|s/?hx?|social( history)?",
    "exam": r"(?!mental)[^:]*exam(ination)?|vital[^:]*",
    "review": r"ros|review of systems|systems review",
}
_TOPICS = {topic: re.compile(pattern, re.IGNORECASE) for topic, pattern in _TOPICS.items()}
# Topics of what is not said of the patient now
_ASIDES = ("family", "drugs", "review")
_OF_PATIENT = re.compile(r"past\b|pmh?x?\b|psh\b|allerg|code status", re.IGNORECASE)
# "CT shows a mass." is no relative's; "Breast cancer was found at 45." may be
_VERBS = frozenset("is are will shows showed reveals revealed demonstrates demonstrated".split())
# Labels that only say which part of the note this is: left out of a quotation
_SILENT = re.compile(
    r"s|o|hp[ci]|c/o|subjective|objective|history|history of presen.*|presenting.*|"
    r"medical (reasoning|treatment)|additional testing|specialist referrals?|patient (education|agreements).*|"
    r"assessment (and|&) plan|a/p|results?|instructions?|vitals.*|physical exam.*|exam(ination)?|findings?",
    re.IGNORECASE,
)
SPELLED_OUT = {"p": "Plan", "a": "Assessment", "imp": "Impression", "rx": "Treatment", "dx": "Diagnosis"}
SPELLED_OUT |= {"cc": "Chief complaint", "pc": "Presenting complaint"}
_SURVEYED = re.compile(r"airway|patent|GCS|AVPU|alert|\b(?:RR|HR|BP|sats?)\b|SpO2", re.IGNORECASE)
_FIRST_AGAIN = re.compile(
    r"(?:it|its|this|that|these|those|they|them|their|both|neither|either|same|also|then|thereafter|"
    r"otherwise|however|but|(?:a )?similar|which|instead|again|nothing|none|another|later|not|never|afterwards?|meanwhile|"
    r"the (?:same|latter|former|others?|rest)|one (?:of|is|was|had|has)|so|and|or|if (?:so|not)|"
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
    r"\b\d{1,3} yearold\b|\b\d{1,3}[\s-]*(?:month|week|day|hour)s?[\s-](?:old|girl|boy|baby|[MF]\b)|\b[MF]\s?\d\d\b|"
    r"\b(?:he|she|boy|girl|man|woman|lady|gentleman)(?: is| of) \d\d?\b|\b(?:male|female), \d\d\b|\bborn (?:at )?\d\d\b|"
    r"\bthis (?:is|patient|lady|gentleman|man|woman|boy|girl|baby)",
    re.IGNORECASE,
)
KIN = re.compile(
    r"\b(?:mother|father|mum|mom|dad|sister|brother|son|daughter|wife|husband|partner|cousin|aunt|uncle|sibling|"
    r"grand\w+|niece|nephew|neighbou?r|donor|housemates?|flatmate|carer)s?\b",
    re.IGNORECASE,
)
_OPEN_QUESTION = re.compile(
    r"(?:what (?:was|is|has|should|did|happened|else)|anything|any other|ready|handing)\b", re.IGNORECASE
)
_SHE = re.compile(r"(?:he|she|his|her)\b(?! (?:was|has been|is to be) \w+(?:ed|en)\b)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Unit:
    """One sentence of a note and what it stands under; numbers are those of sentences, 0: none."""

    number: int  # 1-based, as sentence_spans counts
    text: str  # without bullet and label, on one line
    kind: str  # "sentence", "heading", "question" or "salutation"
    topic: str = ""  # of its label or heading: plan, diagnosis, reason, operation, family, review ...
    label: str = ""  # its label, or that of the line it continues
    label_number: int = 0  # the sentence that holds the label
    heading: int = 0  # the nearest heading
    asked: int = 0  # the question that it answers
    needs: int = 0  # the sentence that it refers back to
    listed: int = 0  # the sentence that begins its list of bullets
    names_patient: bool = False


def topic_of(label: str) -> str:
    """What a label or heading announces; "" if it is none of these."""
    return next((topic for topic, pattern in _TOPICS.items() if pattern.fullmatch(label.strip(" :.?"))), "")


def shown_label(label: str) -> str:
    """The label as a reader wants it; "" for one that says only which part of a note this is."""
    bare = label.strip(" :.")
    if _SILENT.fullmatch(bare):
        return ""
    bare = SPELLED_OUT.get(bare.lower(), bare)
    is_name = len(bare) > 3 and topic_of(bare)
    # "PAST MEDICAL HISTORY", but "PMH" and "CT KUB"
    return bare.capitalize() if bare.isupper() and (len(bare) > 12 or is_name) else bare


def shown_question(units: list[Unit], unit: Unit) -> str:
    """What the sentence answers; "" for "Anything else?", which only starts the talk."""
    asked = units[unit.asked - 1].text if unit.asked else ""
    if unit.names_patient or _OPEN_QUESTION.match(asked):
        return ""
    return asked


def is_next_item(units: list[Unit], unit: Unit, last: Unit | None) -> bool:
    """Whether both are items of one list that goes on with the words of its heading, "She denies:"."""
    if not last or not unit.heading or (last.listed, last.heading) != (unit.listed, unit.heading):
        return False
    head = units[unit.heading - 1]
    # Without bullets or without a colon above, items are short lines without a period
    is_clear = bool(unit.listed) and head.text[-1] == ":"
    between = units[last.number - 1 : unit.number]
    are_items = is_clear or all(len(u.text.split()) <= 3 and u.text[-1].isalnum() for u in between)
    is_own = not head.topic and bool(shown_label(head.text))
    return is_own and are_items and not unit.label and not last.label


def _letters(note: str) -> dict[str, str]:
    """What labels of one letter stand for. Where A, B and C are labels, A is no assessment but the airway; of
    specimens A and B it is neither."""
    used = set(re.findall(r"(?<!\S)([A-Z]):", note))
    # Question and answer; allergies in AMPLE, age in ATMIST
    if "Q" in used:
        return {"A": ""}
    if {"A", "M", "P", "L"} <= used or {"A", "T", "M", "I"} <= used:
        return {"A": "(A)", "P": "(P)"}
    if {"A", "B", "C"} <= used and _SURVEYED.search(note):
        return dict(zip("ABCDE", "Airway Breathing Circulation Disability Exposure".split(), strict=True))
    return {"A": "(A)"} if "B" in used and used.isdisjoint("PR") else {}


def read_units(note: str) -> list[Unit]:
    """Every sentence of the note, in order. Linear in the note's length."""
    lines = _lines(note)
    letters = _letters(note)
    is_mail = all(re.search(rf"^[> ]*{name}:", note, re.MULTILINE) for name in ("From", "Subject"))
    units: list[Unit] = []
    last_with: dict[str, int] = {}
    label, own_label, is_signed = "", False, False
    label_number = section = problem = 0
    for number, (text, gap, _) in enumerate(lines, 1):
        starts_line = gap > 0 or number == 1
        bullet = _BULLET.match(text)
        body = text[bullet.end() :] if bullet else text
        before = units[-1] if units else Unit(0, "", "")
        listed = before.listed if not starts_line else (before.listed or number) if bullet else 0
        # A label in the middle of a line is its sentence's own; "FH: gout. Breast cancer." ends with a verb
        is_aside = topic_of(label) in _ASIDES
        if starts_line or own_label or (is_aside and not _VERBS.isdisjoint(body.lower().split())):
            label, label_number, own_label = "", 0, False
        # What stands right below a heading is under it
        ends = _is_parted(lines, number - 1, before, listed)
        is_story = starts_line and bool(re.search(r"\d", text)) and _names_patient(text)
        if before.number != problem and (ends or ((before.listed or is_story) and not listed)):
            problem = 0
        above = units[section - 1].topic if section else ""
        if before.number != section and ends and (above in _ASIDES or is_story):
            section, above = 0, ""
        heading_kind = _heading_kind(lines, number - 1, body, above)
        if heading_kind:
            name = body.rstrip(". ")
            # "PMH:" is no part of the examination above it
            section = number if heading_kind == "section" else 0 if _OF_PATIENT.match(name) else section
            problem = number if heading_kind == "problem" else 0
            units.append(Unit(number, name, "heading", topic_of(name)))
            continue
        found, body = _take_label(body, starts_line)
        if found:
            label, label_number = letters.get(found, found), number
            own_label = not starts_line and not topic_of(label)
            # "Medications:" with nothing below it but the next field
            if starts_line and above in _ASIDES and (topic_of(label) or _OF_PATIENT.match(label)):
                section, above = 0, ""
        topic = topic_of(label) or (units[problem - 1].topic if problem else "") or above
        kind = _kind(body, topic)
        if _is_address(text, found, is_mail) or (is_signed and not found and _is_signature(body)):
            kind = "salutation"
        is_signed = kind == "salutation" and (is_signed or bool(_CLOSING.search(body)))
        is_answer = before.kind == "question" and kind == "sentence"
        needs = 0 if is_answer or (starts_line and bullet) else _refers_to(body, units, last_with)
        # Read without what stands right after the label, it might be the patient's
        needs = needs or (label_number if label_number != number and topic_of(label) == "family" else 0)
        place = {"heading": problem or section, "listed": listed, "names_patient": _names_patient(text)}
        asked = before.number if is_answer else 0
        units.append(Unit(number, body, kind, topic, label, label_number, asked=asked, needs=needs, **place))
        last_with |= dict.fromkeys(content_stems(body), number)
    return units


def _names_patient(text: str) -> bool:
    """ "8-year-old boy, mother in the room", but not "Her sister is a 30-year-old nurse"."""
    text = spell_out(text)
    named = _NAMES_PATIENT.search(text)
    return bool(named) and not KIN.search(text[max(0, named.start() - 15) : named.start()])


def _take_label(body: str, starts_line: bool) -> tuple[str, str]:
    """The label or time that a sentence begins with, "" if none, and the rest, out of its quotation marks."""
    found = _LABEL.match(body)
    is_label = found and (found["label"] or starts_line) and not re.search(r"\d{2}", found["label"] or "")
    label = (found["label"] or found["time"]) if is_label else ""
    body = body[found.end() :] if label else body
    is_whole = body[:1] in '"“' and body[-1:] in '"”'
    is_cut = body.count('"') % 2 or body.count("“") != body.count("”")
    return label, body.strip(' "“”') if is_whole or is_cut else body


def _lines(note: str) -> list[tuple[str, int, int]]:
    """(sentence on one line, line breaks before it, line breaks after it) for every sentence."""
    spans = sentence_spans(note)
    wrapped = wrapped_newlines(note)
    gaps = [0] if spans else []
    for (_, end), (start, _) in itertools.pairwise(spans):
        gaps.append(sum(note[i] == "\n" and i not in wrapped for i in range(end, start)))
    # Without the frame of a box or table
    texts = [" ".join(note[start:end].split()).strip("| ") or "|" for start, end in spans]
    # "Imp: ? PE": the doubt is about what follows
    for i in range(1, len(texts)):
        if not gaps[i] and re.search(r"(?:^|[:(/,;-]\s?)\?$", texts[i - 1]) and not _LABEL.match(texts[i]):
            texts[i - 1] = texts[i - 1][:-1].rstrip() or "?"
            texts[i] = f"?{texts[i]}"
    return list(zip(texts, gaps, [*gaps[1:], 0], strict=False))


def _is_parted(lines: list[tuple[str, int, int]], i: int, before: Unit, listed: int) -> bool:
    """Whether an empty line parts a sentence from what is before it; a list may have them between items."""
    is_spaced = before.listed and listed and (before.number == listed or lines[i - 1][1] != 1)
    return lines[i][1] > 1 and not is_spaced


def _leads_list(lines: list[tuple[str, int, int]], i: int) -> bool:
    """Whether a sentence, also in the middle of a line, ends with a colon above bullets."""
    is_above = lines[i][2] > 0 and i + 1 < len(lines) and bool(_BULLET.match(lines[i + 1][0]))
    return is_above and lines[i][0][-1] == ":"


def _heading_kind(lines: list[tuple[str, int, int]], i: int, body: str, topic: str) -> str:
    """ "section", "problem" or "": whether the line `body` in a section of this topic heads what follows."""
    text, gap, after = lines[i]
    if i > 0 and not gap and not _leads_list(lines, i):
        return ""
    body = body.strip('"“” ')
    bare = body.rstrip(":. ")
    n_words = len(bare.split())
    if i == len(lines) - 1:
        return "section" if i and topic_of(bare) else ""
    if not after or not re.search(r"\w", body) or body[-1] in "?!;," or _SALUTATION.match(body):
        return ""
    following = lines[i + 1][0]
    if _SALUTATION.match(following):
        return ""
    above_bullets = bool(_BULLET.match(following))
    has_period, has_digits = body[-1] == ".", any(c.isdigit() for c in body)
    if n_words > (25 if _leads_list(lines, i) else 12 if above_bullets else 8):
        return ""
    if _SIDES.fullmatch(bare):
        return "problem"
    # "CODE STATUS: DNR" says something
    is_capitals = bare.isupper() and len(bare) > 3 and not has_period and not has_digits and ": " not in bare
    # "COPD" below "Diagnoses:" is one of them
    below_colon = i > 0 and lines[i - 1][0][-1] == ":"
    is_capitals = is_capitals and not (below_colon and n_words == 1 and len(bare) <= 5 and not topic_of(bare))
    if body[-1] == ":" or is_capitals or (topic_of(bare) and not has_period):
        return "section" if topic_of(bare) or is_capitals else "problem"
    is_numbered, is_bulleted = re.match(_NUMBER, text), _BULLET.match(text)
    # "Plan: stop warfarin" above "2. Gout" heads nothing
    is_said = ": " in body and not (above_bullets and not re.match(_NUMBER, following))
    if i == 0 or is_said or (is_bulleted and not is_numbered) or (has_digits and not above_bullets):
        return ""
    # Nor does "No straws"
    if not above_bullets and re.match(r"(?:no|not|nil|never)\s", bare, re.IGNORECASE):
        return ""
    # "Acute lumbar strain." above its bullets or lines, in an assessment or a plan
    if (
        after == 1
        and re.search("plan|diagnosis", topic)
        and (above_bullets or not is_numbered)
        and not (is_numbered and re.match(_NUMBER, following))
    ):
        # "Gout" above "Atrial fibrillation" is one of several
        is_text = len(following.split()) > n_words and (following[-1] in ".:" or len(following.split()) > 4)
        return "problem" if above_bullets or is_text else ""
    # "Latex" below "Penicillin" or "Allergies:"
    above = lines[i - 1][0]
    is_item = (
        gap == 1
        and (len(above.split()) <= 3 or above[-1] == ":")
        and above[-1] != "."
        and not (topic_of(above) or ": " in above)
    )
    if is_item and not _BULLET.match(above) and not (above_bullets and after == 1):
        return ""
    # "Genitourinary" above "No tenderness."
    is_title = after == 1 and n_words <= 3 and (following[-1] == "." or ":" in following) and topic != "drugs"
    is_above = is_title or (above_bullets and n_words <= 5)
    return "problem" if is_above and not (has_period or ":" in body or is_bulleted) else ""


def _kind(body: str, topic: str) -> str:
    if not re.search(r"\w", body):
        return "heading"
    # "Thank you for seeing this man, who fainted while running": the complaint is told here
    if _SALUTATION.match(body) and (
        len(body.split()) <= 7 or not re.search(r"\d|\b(?:who|whose|with|because)\b", body)
    ):
        return "salutation"
    asks = body.rstrip("\"”'’) ").endswith("?")
    return "question" if asks and "diagnosis" not in topic else "sentence"


def _is_address(text: str, label: str, is_mail: bool) -> bool:
    is_field = _ADDRESS.fullmatch(label) or (is_mail and _MAIL.fullmatch(label))
    return bool(is_field) and not _names_patient(text)


def _is_signature(body: str) -> bool:
    """Whether a line below "Kind regards" names who wrote it."""
    if body.isupper() or re.match(r"P\.?S|Not?\b", body):
        return False
    role = r"(?:senior |locum |clinical )?(?:consultant|registrar|nurse|professor)\b"
    return bool(re.fullmatch(r"(?:[A-Z][\w.'-]*(?:,? |$))+", body) or re.match(role, body, re.IGNORECASE))


def _refers_to(body: str, units: list[Unit], last_with: dict[str, int]) -> int:
    """The sentence that this one refers back to; 0: none."""
    previous = units[-1] if units and units[-1].kind in ("sentence", "question") else None
    if _names_patient(body[:40]):
        return 0
    if previous and (_FIRST_AGAIN.match(body) or _OBJECT_AGAIN.match(body)):
        return previous.number
    # "Her sister takes lithium. She has ...": who, is said before
    if previous and _SHE.match(body) and KIN.search(previous.text[:40]):
        return previous.number
    # "The ovary was ...": which, is said where it was last named
    definite = re.match(r"the (\w+)", body, re.IGNORECASE)
    near = last_with.get(stem(definite[1].lower()), 0) if definite else 0
    return near if near >= max(len(units) - 3, 1) and definite[1].lower() not in ("patient", "plan") else 0
