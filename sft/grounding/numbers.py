"""Numbers."""

import re

from sft.grounding.citations import strip_citations

_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")


def unsupported_numbers(summary: str, note: str) -> list[str]:
    """Numbers the summary states (digits, outside citations) and the note does not hold; 1,200 equals 1200 and 5.0 equals 5."""
    known = {_value(number) for number in _NUMBER.findall(note)}
    stated = _NUMBER.findall(strip_citations(summary))
    return [number for number in dict.fromkeys(stated) if _value(number) not in known]


def _value(number: str) -> str:
    whole, _, fraction = number.replace(",", "").partition(".")
    return f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}"
