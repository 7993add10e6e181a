"""Reads the citations of a summary, like [Evidence: S1,2; Conf: 0.85] after each claim."""

import re

from sft.grounding.sentences import split_sentences

# S1-3 is a range of sentences
_CITATION = re.compile(
    r"\[\s*evidence\s*:\s*(?P<sentences>S\s*\d+(?:\s*[,–-]\s*S?\s*\d+)*)"
    r"\s*;\s*conf(?:idence)?\s*:\s*(?P<confidence>[01](?:\.\d+)?|\.\d+)\s*\]",
    re.IGNORECASE,
)
_CITATION_WITH_SPACE = re.compile(r"\s*" + _CITATION.pattern, re.IGNORECASE)
_LONGEST_RANGE = 1000  # sentences; no note has more


def strip_citations(summary: str) -> str:
    """The summary without its citations."""
    return _CITATION_WITH_SPACE.sub("", summary).strip()


def has_citation(summary: str) -> bool:
    return _CITATION.search(summary) is not None


def cited_sentence_numbers(summary: str) -> list[int]:
    """Every sentence number that the summary cites."""
    return [n for match in _CITATION.finditer(summary) for n in _sentence_numbers(match["sentences"])]


def parse_citations(summary: str, note: str) -> list[dict]:
    """Every citation of a summary with what it cites.

    Returns one dict per citation: `claim` (the summary's words before it), `sentence_numbers` (1-based),
    `sentences` (the note's sentences with these numbers), `missing` (numbers that the note does not have),
    `confidence` (the number the model wrote, 0 to 1; see the guide on how far to trust it).
    """
    sentences = split_sentences(note)
    citations = []
    claim_start = 0
    for match in _CITATION.finditer(summary):
        numbers = _sentence_numbers(match["sentences"])
        existing = [n for n in numbers if 1 <= n <= len(sentences)]
        citations.append(
            {
                "claim": summary[claim_start : match.start()].strip(),
                "sentence_numbers": numbers,
                "sentences": [sentences[n - 1] for n in existing],
                "missing": [n for n in numbers if n not in existing],
                "confidence": min(float(match["confidence"]), 1.0),
            }
        )
        claim_start = match.end()
    return citations


def _sentence_numbers(text: str) -> list[int]:
    """ "S1,3-5" -> [1, 3, 4, 5]. Of a range that is too long or runs backward, the ends alone."""
    numbers = []
    for part in re.sub(r"[Ss\s]", "", text).split(","):
        # The ninth digit is enough for any note, and int() refuses thousands of them
        ends = [int(number[:9]) for number in re.split(r"[–-]", part)]
        is_range = ends[0] < ends[-1] <= ends[0] + _LONGEST_RANGE
        numbers += range(ends[0], ends[-1] + 1) if is_range else ends
    return list(dict.fromkeys(numbers))
