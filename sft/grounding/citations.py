"""Citations."""

import re

from sft.grounding.sentences import split_sentences

# [Evidence: S1,2; Conf: 0.85], with S1-3 for a run of sentences
_CITATION = re.compile(
    r"\[\s*evidence\s*:\s*(?P<sentences>S\s*\d+(?:\s*[,–-]\s*S?\s*\d+)*)\s*;\s*conf(?:idence)?\s*:\s*(?P<conf>[01](?:\.\d+)?|\.\d+)\s*\]",
    re.IGNORECASE,
)


def strip_citations(summary: str) -> str:
    """The summary without its citations."""
    return re.sub(r"\s*" + _CITATION.pattern, "", summary, flags=re.IGNORECASE).strip()


def has_citation(summary: str) -> bool:
    return _CITATION.search(summary) is not None


def cited_sentence_numbers(summary: str) -> list[int]:
    """Every sentence number the summary cites."""
    return [n for match in _CITATION.finditer(summary) for n in _sentence_numbers(match["sentences"])]


def parse_citations(summary: str, note: str) -> list[dict]:
    """Every citation of a summary with what it cites.

    Returns one dict a citation: `claim` (the summary's words before it), `sentence_numbers` (1-based),
    `sentences` (the note's sentences of these numbers), `missing` (numbers the note does not have),
    `confidence` (the number the model wrote, 0 to 1; see the guide on how far to trust it).
    """
    sentences = split_sentences(note)
    evidence, start = [], 0
    for match in _CITATION.finditer(summary):
        numbers = _sentence_numbers(match["sentences"])
        exists = [n for n in numbers if 1 <= n <= len(sentences)]
        evidence.append(
            {
                "claim": summary[start : match.start()].strip(),
                "sentence_numbers": numbers,
                "sentences": [sentences[n - 1] for n in exists],
                "missing": [n for n in numbers if n not in exists],
                "confidence": min(float(match["conf"]), 1.0),
            }
        )
        start = match.end()
    return evidence


def _sentence_numbers(text: str) -> list[int]:
    """ "S1,3-5" -> [1, 3, 4, 5]; a run longer than any note's (1,000 sentences) is read as its two ends."""
    numbers = []
    for part in re.sub(r"[Ss\s]", "", text).split(","):
        first, *last = [int(number[:9]) for number in re.split(r"[–-]", part)]
        numbers += range(first, last[-1] + 1) if last and first < last[-1] <= first + 1000 else [first, *last]
    return list(dict.fromkeys(numbers))
