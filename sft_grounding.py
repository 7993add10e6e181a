"""Is this summary supported by this note? Pure text: no torch, no model.

Notes are split into sentences, numbered S1, S2, ... in the prompt, and cited in a summary as
`[Evidence: S1,2; Conf: 0.85]`. This module splits, numbers, reads citations back and compares numbers.
"""

import re

# A full stop, question or exclamation mark before white space (with closing quotes or brackets), or a line's end.
_BOUNDARY = re.compile(r"""(?P<mark>[.!?…])["'”’)\]]*(?=\s)|(?P<newline>\n)""")
_LIST_NUMBER = re.compile(r"\s*\(?\d{1,3}")
# Never the end of a sentence (case counts: "MR." and "ms." are mitral regurgitation and milliseconds)
_NEVER_END = frozenset("Dr Mr Mrs Ms Prof St vs eg ie e.g i.e cf approx incl Fig fig".split())
# The end only where a capital or a digit follows
_ABBREVIATIONS = frozenset("pt pts hx dx tx rx sx fx yo yr yrs wk wks mo mos hr hrs min mins sec tab tabs cap caps dept inc".split())
_DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]")  # b.i.d, p.o, a.m
_WRAP_WIDTH = 60  # a shorter line is a list item or a heading, not a wrapped line

# [Evidence: S1,2; Conf: 0.85], with S1-3 for a run of sentences
_CITATION = re.compile(
    r"\[\s*evidence\s*:\s*(?P<sentences>S\s*\d+(?:\s*[,–-]\s*S?\s*\d+)*)\s*;\s*conf(?:idence)?\s*:\s*(?P<conf>[01](?:\.\d+)?|\.\d+)\s*\]",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of every sentence of `text`, in order, without overlap; together they hold every visible character.

    Made for clinical notes: list items, headings and dialogue turns are sentences of their own, wrapped lines are
    joined, decimal points and common abbreviations do not end a sentence.
    """
    spans, start = [], 0
    for match in _BOUNDARY.finditer(text):
        if _ends_sentence(text, start, match):
            spans.append((start, match.end()))
            start = match.end()
    spans.append((start, len(text)))
    return [_strip(text, *span) for span in spans if text[slice(*span)].strip()]


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _ends_sentence(text: str, start: int, match: re.Match) -> bool:
    after = text[match.end() : match.end() + 40]
    if match["newline"]:
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].rstrip()
        wrapped = len(line) >= _WRAP_WIDTH and line[-1] not in ".!?:;" and after[:1].islower()
        return not wrapped
    if match["mark"] != ".":
        return True
    before = text[max(start, match.start() - 40) : match.start()]
    if _LIST_NUMBER.fullmatch(text[start : min(start + 8, match.start())]) and "\n" not in after[: len(after) - len(after.lstrip())]:
        return False  # "1. Diabetes"
    word = before.split()[-1].lstrip("([\"'") if before.split() else ""
    following = after.lstrip()[:1]
    if word in _NEVER_END or (len(word) == 1 and word.isupper() and following.islower()):  # E. coli
        return False
    if word.lower() == "no":
        return not following.isdigit()  # "room no. 4", but "Any pain? No. Any fever?"
    if word.lower() in _ABBREVIATIONS or _DOTTED.fullmatch(word):
        return following.isupper() or following.isdigit() or not following
    return True


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, each on one line (inner white space folded)."""
    return [" ".join(text[start:end].split()) for start, end in sentence_spans(text)]


def number_sentences(text: str) -> list[str]:
    """["S1: first sentence", "S2: second sentence", ...]: the lines of a note as an evidence-trained model reads it."""
    return [f"S{number}: {sentence}" for number, sentence in enumerate(split_sentences(text), 1)]


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


def unsupported_numbers(summary: str, note: str) -> list[str]:
    """Numbers the summary states (digits, outside citations) and the note does not hold; 1,200 equals 1200 and 5.0 equals 5."""
    known = {_value(number) for number in _NUMBER.findall(note)}
    stated = _NUMBER.findall(strip_citations(summary))
    return [number for number in dict.fromkeys(stated) if _value(number) not in known]


def _value(number: str) -> str:
    whole, _, fraction = number.replace(",", "").partition(".")
    return f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}"
