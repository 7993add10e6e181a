"""Reads the citations of a summary, like [Evidence: S1,2; Conf: 0.85] after each claim.

Every function takes time linear in the text: no pattern has two ways to read the same characters."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from sft.grounding.sentences import SENTENCE_VERSION, split_sentences

# What may be a citation, also between marks of Markdown ("*[S1]*"): text in brackets of any kind;
# "[Evidence: S1, 2" that never ends, as far as it looks like one; "Evidence: S1", "Source: S1" without
# brackets
_SOURCE = (
    r"(?:ev|sources?+|ref(?:erence)?s?+|see|cite[ds]?+|citations?+|supported\s++by|based\s++on|from|per)\b"
)
_CANDIDATE = re.compile(
    r"(?:(?<!\S)(?P<mark>\*{1,3}|_))?(?:\[\[(?P<double>[^\[\]]*+)\]\]|⟦(?P<white>[^⟦⟧\[\]]*+)⟧|«(?P<quoted>\s?S\s?\d[^«»()\[\]]*+)»"
    r"|\[(?P<square>[^\[\]]*+)\]|【(?P<lenticular>[^\[\]【】]*+)】|\((?P<round>[^()\[\]]*+)\)"
    r"|\{(?P<curly>[^{}()\[\]]*+)\}|<(?P<angle>[^<>{}()\[\]]*+)>"
    r"|[\[{<【]\s*+(?:evidence\b|conf(?:idence)?\b|" + _SOURCE + r"\s*+:?+\s*+S\s?\d)"
    r"(?:[\s,;:&/=%.–—-]++|S?\d++|and\b|to\b|conf(?:idence)?\b)*+"
    r"|\b(?P<bare>(?:evidence\s*+:?+|sources?+\s*+:)\s*+S\s?\d++"
    r"(?:[ \t,;:&/=%–—-]++|\.(?=\d)|S?\d++|and\b|to\b|conf(?:idence)?\b)*+))(?(mark)(?P=mark))",
    re.IGNORECASE,
)
# "see", "source", "from" introduce much else: only before the name of a sentence
_HEAD = re.compile(
    r"\s*+(?:(?P<evidence>evidence|conf(?:idence)?)\b\s*+[:=,;]?+"
    r"|(?P<source>" + _SOURCE + r"\s*+[:=]?+\s*+(?=S\s?\d|sentence)))?"
    r"\s*+(?P<sentence>sentences?+\b\s*+:?+)?",
    re.IGNORECASE,
)
# [1], [^1] or [1, 2-3]; whether a sentence ends before it, and right after it
_PLAIN_NUMBERS = re.compile(r"([.!?]\s?)?\[\^?\d{1,3}(?:\s?[,;–-]\s?\d{1,3})*+\](?=([.!?](?:\s|\Z))?)")
_NUMBER = r"(?:S\s*+|sentences?+\s++)?(\d++)"
_ITEM = re.compile(rf"{_NUMBER}(?:\s*+(?:[–—-]|to\b|through\b)\s*+{_NUMBER})?", re.IGNORECASE)
_LIST = re.compile(rf"[\s.,:;]*+(?:[\s,;&+/|]++|and\b|or\b|{_ITEM.pattern})*+[\s.,:;(]*+", re.IGNORECASE)
_CONFIDENCE = re.compile(
    r"conf|(?:score|certainty|prob(?:ability)?)\b|\b(?:high|medium|moderate|low)\s++conf|\d?\.\d|\d{1,3}\s?%",
    re.IGNORECASE,
)
_CONFIDENCE_VALUE = re.compile(r"(?:\d{1,3}(?:[.,]\d{1,9})?|\.\d{1,9})\s?%?")
_SENTENCE_NAME = re.compile(r"(?:\bS\s?|sentence)\d", re.IGNORECASE)
# In square brackets hardly anything else than a citation, unless it is about nerve roots or heart sounds
_CITED_NAME = re.compile(r"(?<![\w'’/–-])S\d{1,3}\b")
_ANATOMY = re.compile(
    r"\b(?:[CTL]\d|dermatom|roots?\b|nerve|radicul|vertebra|sacr|joint|level|segment|heart|gallop|murmur|sound"
    r"|normal|audible|split|loud)",
    re.IGNORECASE,
)
_LONGEST_RANGE = 1000  # sentences; no note has more


class Citation(NamedTuple):
    start: int
    end: int
    numbers: list[int]  # [] if it cannot be read
    confidence: float | None


def strip_citations(summary: str) -> str:
    """The summary without its citations, also without those that cannot be read."""
    pieces = []
    position = 0
    for start, end in citation_spans(summary):
        pieces.append(summary[position:start].rstrip())
        position = end
        # "Fever. Evidence: S1." has one period too many
        if summary[:start].rstrip()[-1:] in ("", ".", "!", "?") and summary[end : end + 1] == ".":
            position += 1
    return "".join([*pieces, summary[position:]]).strip()


def citation_spans(summary: str) -> list[tuple[int, int]]:
    """(start, end) of every citation, in order, also of those that cannot be read."""
    return [citation[:2] for citation in find_citations(summary)]


def has_citation(summary: str) -> bool:
    return any(citation.numbers for citation in find_citations(summary))


def cited_sentence_numbers(summary: str) -> list[int]:
    """Every sentence number that the summary cites."""
    return [number for citation in find_citations(summary) for number in citation.numbers]


def unreadable_citations(summary: str) -> list[tuple[int, int]]:
    """(start, end) of what is meant as a citation, but names no sentences: "[Evidence: the note]", or
    "[Evidence: S1, 2" without an end."""
    return [citation[:2] for citation in find_citations(summary) if not citation.numbers]


def parse_citations(summary: str, note: str, version: int = SENTENCE_VERSION) -> list[dict]:
    """Every citation of a summary with what it cites. `version`: of the note's sentence numbers.

    Returns one dict per citation: `claim` (the summary's words before it), `sentence_numbers` (1-based),
    `sentences` (the note's sentences with these numbers), `missing` (numbers that the note does not have),
    `confidence` (the number the model wrote, 0 to 1, or None; see the guide on how far to trust it)."""
    sentences = dict(enumerate(split_sentences(note, version), 1))
    citations = []
    claim_start = 0
    for start, end, numbers, confidence in find_citations(summary):
        if numbers:
            citation = {
                "claim": summary[claim_start:start].strip(),
                "sentence_numbers": numbers,
                "sentences": [sentences[n] for n in numbers if n in sentences],
                "missing": [n for n in numbers if n not in sentences],
                "confidence": confidence,
            }
            citations.append(citation)
        claim_start = end
    return citations


def find_citations(summary: str) -> Iterator[Citation]:
    """What is meant as a citation, in order; `numbers` is empty if it cannot be read."""
    cites_plainly = _cites_plainly(summary)
    for match in _CANDIDATE.finditer(summary):
        start, end = match.start(), match.start() + len(match[0].rstrip())
        # "[Evidence: S1, 2" that never ends
        if match.lastgroup in (None, "mark"):
            yield Citation(start, end, [], None)
            continue
        content = match[match.lastgroup].removeprefix("^")
        head = _HEAD.match(content)
        numbers, confidence = _read(content[head.end() :])
        is_plain = cites_plainly and _PLAIN_NUMBERS.fullmatch(match[0]) is not None
        if numbers and (is_plain or _is_named(summary, match, head)):
            yield Citation(start, end, numbers, confidence)
        elif _is_meant(content, head, match.lastgroup):
            yield Citation(start, end, [], None)


def _cites_plainly(summary: str) -> bool:
    """Whether [1] is a citation in this summary: each ends a sentence, and the last one ends the text. Else
    it numbers a list, or is a grade or a footnote: "Results [1]"."""
    found = list(_PLAIN_NUMBERS.finditer(summary))
    if not found or summary[found[-1].end() :].strip(".!? \n"):
        return False
    return all(match[1] or (match[2] and len(found) > 1) for match in found)


def _is_named(summary: str, match: re.Match, head: re.Match) -> bool:
    """Whether the numbers of a candidate are called the sentences that support a claim."""
    before = summary[max(0, match.start() - 3) : match.start()]
    after_sentence = before.rstrip()[-1:] in (".", "!", "?")
    if match.lastgroup == "bare":
        # "No evidence: S1 is free", but "Fever Evidence: S1."
        begins = after_sentence or not before or before[-1] == "\n"
        is_label = match[0][0] in "ES" and ":" in match[0]
        return (begins or is_label) and not summary[match.end() : match.end() + 1].islower()
    # "(from S1 to S3)" may be the spine
    is_spine = match.lastgroup == "round" and re.match("from|per", head[0].strip(), re.IGNORECASE)
    if any(head.groups()) and not is_spine:
        return True
    # "(S1)" is a nerve root or a heart sound, unless it follows a sentence
    has_name = _SENTENCE_NAME.match(match[match.lastgroup].lstrip(" \t\n^")) is not None
    return has_name and (match.lastgroup != "round" or after_sentence)


def _is_meant(content: str, head: re.Match, kind: str) -> bool:
    """Whether text in brackets is meant as a citation: "Evidence: none", not "evidence of pneumonia"; in
    square ones all that names a sentence."""
    # "(evidence: normal X-ray)" is the summary's own
    if kind in ("round", "bare"):
        return False
    is_square = kind in ("double", "white", "square")
    if is_square and _CITED_NAME.search(content) and not _ANATOMY.search(content):
        return True
    if not head["evidence"]:
        return head["source"] is not None
    has_colon = head[0].rstrip()[-1:] in (":", "=", ";", ",")
    return has_colon or head["evidence"] == content.strip() or _SENTENCE_NAME.search(content) is not None


def _read(text: str) -> tuple[list[int], float | None]:
    """ "S1, 3-5; Conf: 0.9" -> ([1, 3, 4, 5], 0.9). No numbers if it is something else."""
    confidence_start = _CONFIDENCE.search(text)
    listed = text[: confidence_start.start()] if confidence_start else text
    value = _CONFIDENCE_VALUE.search(text, confidence_start.start()) if confidence_start else None
    numbers = []
    for digits, last_digits in _ITEM.findall(listed) if _LIST.fullmatch(listed) else ():
        # The ninth digit is enough for any note, and int() refuses thousands of them
        first = int(digits[:9])
        last = int(last_digits[:9] or first)
        # Of a range that is too long or runs backward, the ends alone
        is_range = first < last <= first + _LONGEST_RANGE
        numbers += range(first, last + 1) if is_range else (first, last)
    return list(dict.fromkeys(numbers)), _confidence(value[0]) if value else None


def _confidence(text: str) -> float | None:
    """ "0.85", "85 %" and "85" -> 0.85; "5" may be of 10 or of 5."""
    number = float(text.rstrip("% ").replace(",", "."))
    if "%" in text or number >= 10:
        return min(number / 100, 1.0)
    return min(number, 1.0) if number < 2 else None
