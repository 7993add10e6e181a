"""Whether lines or paragraphs are notes of their own or parts of one: signs that are added up.

Files of one note a line are often read; a note that is taken apart gives one invented summary a line."""

import re
from collections.abc import Sequence
from itertools import pairwise

_TIME = r"(?:[01]?\d|2[0-3])[:.h]?[0-5]\d\b(?![/.,-]\d)"
_DATE = (
    r"(?:\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|\d{4}-\d\d-\d\d|\d{1,2}(?:st|nd|rd|th)? (?:jan|feb|mar|apr|may|jun|jul"
    r"|aug|sep|oct|nov|dec)[a-z]{0,6})\b"
)
_PATIENT = (
    r"\b(?:\d{1,3} ?[MF]|y/?o|(?:year|month|week|day)s?[ -]old|(?:wo)?man|lady|gentleman|boy|girl|(?:fe)?male|mrs?|ms"
    r"|patient|pt)\b"
)
# A dated line that names its patient may be a note of its own; a longer one too
_DATED = rf"(?!.*{_PATIENT}){_DATE}.{{0,110}}"
_DOSE = r"[^\W\d_]{4,30}(?: [^\W\d_]{2,30})? \d[\d.,]{0,6} ?(?:mg|mcg|µg|g|ml|units?|iu)\b(?!/).*"
_LABEL = r"([^\W\d_][\w/()-]{0,30}):\s(?:[^:\n]|:\S)*"  # alone in its line: a whole dialogue has several
# What no note begins with
_LATE_SECTION = (
    r"(?:(?:plan|impression|assessment|obs|(?:on )?exam(?:ination)?|meds|medications?|allerg(?:y|ies)|labs|results"
    r"|disposition|(?:social|family|past medical) history)\s*:|(?:imp|a/p|pmh|psh|o/e)\b)"
)
_GREETING = (
    r"(?:dear|to whom it may|hello|hi|yours|sincerely|(?:with )?(?:kind|best|warm) (?:regards|wishes))\b"
    r"[^.!?:\n]{0,40}[,:.]?|(?:ch[eè]re?s?|madame|monsieur|mesdames|sehr geehrter?|estimad[oa])\b[^.!?:\n]{0,40},"
)
# What few notes begin with
_GOES_ON = (
    r"(?:he|his|she|her|they|it|their|these|we|also|then|however|otherwise|there|if|plan"
    r"|impression|obs|exam|examination|bloods|continue|denies|no|meds|advised|suggest|follow|review"
    r"|discharged?|home|repeat|current)\b|(?:bp|hr|rr|t|temp|spo2|sats|gcs|hb|wcc|wbc|crp|lactate|na|k|pain)\b.{0,12}\d"
)
_HEADING = r"(?:[^\W\d_][^.!?:\n]{0,50}:|[^\Wa-z_][^a-z.!?\n]{4,50})$"
_ITEM = r"\d{1,2}[.)]\s"
# What shows that two units are parts of one note, in the text "one\nother" (where all of a file begin alike,
# that is its style); how often it may be chance; in which share of the places more is enough alone. "no" and
# "was" may be a dialogue's last words
_SIGNS = {
    "sentences run on over their ends": (0, 0.12, r"\A[^a-z].{15,}[^.!?:;\"')\]]\n[a-z]|(?i:\b(?:an?|the|and|or|of|to|in|with|for|from"
                                                  r"|by|at|on|his|her|their|has|which))\n"),
    "headings stand alone": (0, 0.03, rf"\A(?!{_HEADING}).*\n{_HEADING}|\A{_HEADING}\n(?!{_HEADING})"),
    "sections of a note": (0, 0.03, rf"(?i)\A(?!{_LATE_SECTION}).*\n{_LATE_SECTION}"),
    "greetings of a letter": (0, 0.001, rf"(?i)^(?:{_GREETING})$"),
    "lists": (0, 0.1, rf"\A[-*•·]\s.*\n[-*•·]\s|\A(?!{_ITEM}).*\n{_ITEM}"),
    "times in a row": (0, 0.5, rf"\A{_TIME}.*\n{_TIME}"),
    "dates in a row": (0, 0.5, rf"(?i)\A{_DATED}\n{_DATED}\Z"),
    "doses in a row": (0, 0.1, rf"(?i)\A{_DOSE}\n{_DOSE}"),
    "speakers or fields take turns": (0, 0.4, rf"\A{_LABEL}\n(?!\1:){_LABEL}\Z"),
    "sentences go on about one patient": (1, 0.25, rf"(?i)\n(?:{_GOES_ON})"),
    "very short": (0, 2.2, r"\A.{0,39}\n"),
}  # fmt: skip


def suspicion(units: Sequence[str]) -> str:
    """Why these lines or paragraphs look like parts of notes; "" if each looks like a note of its own."""
    units = [" ".join(unit.split()) for unit in units]
    places = [f"{one}\n{other}" for one, other in pairwise(units)]
    scores = {}
    for reason, (chance, enough, sign) in _SIGNS.items():
        n = sum(bool(re.search(sign, place, re.MULTILINE)) for place in places)
        scores[reason] = max(0, n - chance) / max(len(places), 1) / enough
    names_patient = [bool(re.search(_PATIENT, unit, re.IGNORECASE)) for unit in units]
    if len(units) > 2 and any(names_patient[:2]) and sum(names_patient[2:]) <= 0.2 * (len(units) - 2):
        scores["only the first names a patient"] = 0.45
    return max(scores, key=scores.get) if sum(scores.values()) >= 1 else ""
