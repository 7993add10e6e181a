"""Compares the numbers of a summary with those of its note."""

import re

from sft.grounding.citations import strip_citations

# 1,200.5, and .5 unless it follows a letter, as in "q.4h"
_NUMBER = re.compile(r"(?<![\w.])(?:\d+(?:,\d{3})+(?:\.\d+)?|\.\d+)|\d+(?:\.\d+)?")


def unsupported_numbers(summary: str, note: str) -> list[str]:
    """Numbers that the summary states (in digits, outside citations) and the note does not hold.

    1,200 equals 1200, 5.0 equals 5, and .5 equals 0.5.
    """
    known = {_canonical(number) for number in _NUMBER.findall(note)}
    stated = _NUMBER.findall(strip_citations(summary))
    return [number for number in dict.fromkeys(stated) if _canonical(number) not in known]


def _canonical(number: str) -> str:
    """One spelling for equal numbers: "1,200.50" -> "1200.5", "5" -> "5."."""
    whole, _, fraction = number.replace(",", "").partition(".")
    return f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}"
