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
_ABBREVIATIONS = frozenset(
    "pt pts hx dx tx rx sx fx yo yr yrs wk wks mo mos hr hrs min mins sec tab tabs cap caps dept inc".split()
)
_DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]")  # b.i.d, p.o, a.m
_WRAP_WIDTH = 60  # a shorter line is a list item or a heading, not a wrapped line


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
    if (
        _LIST_NUMBER.fullmatch(text[start : min(start + 8, match.start())])
        and "\n" not in after[: len(after) - len(after.lstrip())]
    ):
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
