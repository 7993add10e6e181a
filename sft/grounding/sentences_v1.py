"""The sentence boundaries of version 1. Adapters trained on notes numbered with it depend on them: nothing in
this module may change. See sentences.py for the rules in use."""

import re

# A period, question or exclamation mark (and closing quotes or brackets) before white space, or a line's end
_BOUNDARY = re.compile(r"""(?P<mark>[.!?…])["'”’)\]]*(?=\s)|(?P<newline>\n)""")
_LIST_NUMBER = re.compile(r"\s*\(?\d{1,3}")
# Never the end of a sentence. Case counts: "MR." and "ms." are mitral regurgitation and milliseconds
_NEVER_END = frozenset("Dr Mr Mrs Ms Prof St vs eg ie e.g i.e cf approx incl Fig fig".split())
# The end only if a capital or a digit follows
_ABBREVIATIONS = frozenset(
    "pt pts hx dx tx rx sx fx yo yr yrs wk wks mo mos hr hrs min mins sec tab tabs cap caps dept inc".split()
)
_DOTTED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]")  # b.i.d, p.o, a.m
_WRAP_WIDTH = 60  # a shorter line is a list item or a heading, not a wrapped line


def boundaries(text: str) -> list[int]:
    """Where the sentences of `text` end, in order, without its end."""
    ends = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        after = text[match.end() : match.end() + 40]
        if match["newline"]:
            line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].rstrip()
            is_end = len(line) < _WRAP_WIDTH or line[-1] in ".!?:;" or not after[:1].islower()
        else:
            is_end = match["mark"] != "." or _period_ends_sentence(text, start, match.start(), after)
        if is_end:
            start = match.end()
            ends.append(start)
    return ends


def _period_ends_sentence(text: str, start: int, period: int, after: str) -> bool:
    white_space = after[: len(after) - len(after.lstrip())]
    following = after.lstrip()[:1]
    # "1. Diabetes": the number of a list item, with text on the same line
    if _LIST_NUMBER.fullmatch(text[start : min(start + 8, period)]) and "\n" not in white_space:
        return False
    words = text[max(start, period - 40) : period].split()
    word = words[-1].lstrip("([\"'") if words else ""
    # "E. coli"
    is_initial = len(word) == 1 and word.isupper() and following.islower()
    if word in _NEVER_END or is_initial:
        return False
    # "room no. 4", but "Any pain? No. Any fever?"
    if word.lower() == "no":
        return not following.isdigit()
    if word.lower() in _ABBREVIATIONS or _DOTTED.fullmatch(word):
        return following.isupper() or following.isdigit() or not following
    return True
