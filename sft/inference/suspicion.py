"""Whether lines or paragraphs are notes of their own or parts of one: signs that are added up.

Files of one note a line are often read; a note that is taken apart gives one invented summary a line. Every
sign is a share of the units over the share at which it is enough alone.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

_ENDED = re.compile(r"[.!?:;\"')\]]$")
# No sentence ends so; "no" and "was" may be a dialogue's last words
_CUT_OFF = re.compile(
    r"\b(an?|the|and|or|of|to|in|with|for|from|by|at|on|his|her|their|has|which)$", re.IGNORECASE
)
_HEADING = re.compile(r"[^\W\d_][^.!?:]{0,50}:|[^\Wa-z_][^a-z.!?]{4,50}")
_LATE_SECTION = re.compile(  # what no note begins with
    r"(plan|impression|assessment|obs|(on )?exam(ination)?|meds|medications?|allerg(y|ies)|labs|results"
    r"|disposition|(social|family|past medical) history)\s*:|(imp|a/p|pmh|psh|o/e)\b",
    re.IGNORECASE,
)
_GREETING = re.compile(
    r"(dear|to whom it may|hello|hi|yours|sincerely|((with )?(kind|best|warm) (regards|wishes)))\b"
    r"[^.!?:]{0,40}[,:.]?|(ch[eè]re?s?|madame|monsieur|mesdames|sehr geehrter?|estimad[oa])\b[^.!?:]{0,40},",
    re.IGNORECASE,
)
_ITEM = re.compile(r"(\d{1,2}[.)]|[-*•·])\s+\S")
_TIME = re.compile(r"([01]?\d|2[0-3])[:.h]?([0-5]\d)\b(?![/.,-]\d)")
_DATE = re.compile(
    r"\d{1,2}([./-])\d{1,2}\1(\d{4}|\d\d)\b|\d{4}-\d\d-\d\d\b"
    r"|\d{1,2}(st|nd|rd|th)? (jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)",
    re.IGNORECASE,
)
_DOSE = re.compile(
    r"[^\W\d_]{4,30}( [^\W\d_]{2,30})? \d[\d.,]{0,6} ?(mg|mcg|µg|g|ml|units?|iu)\b(?!/)", re.IGNORECASE
)
_LABEL = re.compile(r"(?<!\S)([^\W\d_][\w/()-]{0,30}):\s")
_GOES_ON = re.compile(  # what few notes begin with
    r"((?P<he>he|his)|(?P<she>she|her)|they|it|their|these|we|also|then|however|otherwise|there|if|plan"
    r"|impression|obs|exam|examination|bloods|continue|denies|no|meds|advised|suggest|follow|review"
    r"|discharged?|home|repeat|current)\b"
    r"|(bp|hr|rr|t|temp|spo2|sats|gcs|hb|wcc|wbc|crp|lactate|na|k|pain)\b.{0,12}\d",
    re.IGNORECASE,
)
_PATIENT = re.compile(
    r"\b(\d{1,3} ?[MF]|y/?o|(year|month|week|day)s?[ -]old|wo?man|lady|gentleman|boy|girl|(fe)?male|mrs?|ms"
    r"|patient|pt)\b",
    re.IGNORECASE,
)
_ENTRY = 120  # characters, most for a dated line of a longer note
_SHORT = 40  # characters, too few for a note that needs a summary


def suspicion(units: Sequence[str]) -> str:
    """Why these lines or paragraphs look like parts of notes; "" if each looks like a note of its own."""
    if len(units) < 2:
        return ""
    units = [unit.strip() for unit in units]
    signs = {reason: sign(units) for reason, sign in _SIGNS.items()}
    return max(signs, key=signs.get) if sum(signs.values()) >= 1 else ""


def _running_on(units: Sequence[str]) -> float:
    # Longer ones are not wrapped lines
    cut_off = sum(len(unit) < 200 and bool(_CUT_OFF.search(unit)) for unit in units[:-1]) / len(units)
    lower = sum(b[:1].islower() and not _ENDED.search(a) for a, b in pairwise(units)) / len(units)
    # Where the first begins in lower case too, that is somebody's style
    return max(cut_off / 0.15, 0 if units[0][:1].islower() else lower / 0.1)


def _headings(units: Sequence[str]) -> float:
    share = sum(bool(_HEADING.fullmatch(unit)) for unit in units) / len(units)
    # Where all are so, that is a file of single words
    return share / 0.02 if share <= 0.9 else 0


def _sections(units: Sequence[str]) -> float:
    share = sum(bool(_LATE_SECTION.match(unit)) for unit in units) / len(units)
    return 0 if _LATE_SECTION.match(units[0]) else share / 0.03


def _greetings(units: Sequence[str]) -> float:
    return sum(bool(_GREETING.fullmatch(unit)) for unit in units)


def _lists(units: Sequence[str]) -> float:
    marks = [match[1] if (match := _ITEM.match(unit)) else "" for unit in units]
    # Notes may be numbered
    if all(mark[:1].isdigit() for mark in marks):
        return 0
    return sum(bool(a) and (a == b or _is_next(a, b)) for a, b in pairwise(marks)) / len(units) / 0.1


def _is_next(a: str, b: str) -> bool:
    return a[:-1].isdigit() and b[:-1].isdigit() and int(b[:-1]) == int(a[:-1]) + 1


def _times(units: Sequence[str]) -> float:
    times = [(int(match[1]), int(match[2])) if (match := _TIME.match(unit)) else None for unit in units]
    return sum(bool(a and b) and a <= b for a, b in pairwise(times)) / (len(units) - 1) / 0.5


def _dates(units: Sequence[str]) -> float:
    # A line that names its patient may be a dated note of its own
    dated = [bool(_DATE.match(unit)) and len(unit) < _ENTRY and not _PATIENT.search(unit) for unit in units]
    return sum(a and b for a, b in pairwise(dated)) / (len(units) - 1) / 0.5


def _doses(units: Sequence[str]) -> float:
    has_dose = [bool(_DOSE.match(unit)) for unit in units]
    return sum(a and b for a, b in pairwise(has_dose)) / len(units) / 0.1


def _turns(units: Sequence[str]) -> float:
    found = [_LABEL.findall(unit) for unit in units]
    # A whole dialogue in one unit has several
    labels = [names[0] if len(names) == 1 and _LABEL.match(unit) else "" for names, unit in zip(found, units)]
    return sum(bool(a and b and a != b) for a, b in pairwise(labels)) / (len(units) - 1) / 0.4


def _going_on(units: Sequence[str]) -> float:
    found = [match for unit in units[1:] if (match := _GOES_ON.match(unit))]
    # He and she are two patients
    n_both = min(sum(bool(match[name]) for match in found) for name in ("he", "she"))
    # One alone may be chance
    n = max(0, len(found) - n_both - 1)
    return 0 if _GOES_ON.match(units[0]) else n / (len(units) - 1) / 0.25


def _shortness(units: Sequence[str]) -> float:
    return sum(len(unit) < _SHORT for unit in units) / len(units) / 2.2


def _one_patient(units: Sequence[str]) -> float:
    names_patient = [bool(_PATIENT.search(unit)) for unit in units]
    is_first = any(names_patient[:2]) and sum(names_patient[2:]) <= 0.2 * (len(units) - 2)
    return 0.45 if len(units) > 2 and is_first else 0


_SIGNS = {
    "sentences run on over their ends": _running_on,
    "headings stand alone": _headings,
    "sections of a note": _sections,
    "greetings of a letter": _greetings,
    "lists": _lists,
    "times in a row": _times,
    "dates in a row": _dates,
    "doses in a row": _doses,
    "speakers or fields take turns": _turns,
    "sentences go on about one patient": _going_on,
    "very short": _shortness,
    "only the first names a patient": _one_patient,
}
