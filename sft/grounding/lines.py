"""Which line breaks of a text were put there by an e-mail program, an export or a text editor that wraps at a
fixed width, and so do not end a sentence."""

import re

_WIDTHS = range(40, 131)  # columns that programs wrap at
_LONG = 60  # a lower-case line after a shorter one may be the next item of a list
# An item, a heading or a turn of a dialogue begins here, whatever came before
_ITEM = re.compile(
    r"(?:[-*•·–—+>▪◦●]+\s|\(?(?P<number>\d{1,3})[.)](?:\s|$)|[a-z][.)]\s|[A-Z][.)]\s+[A-Z]|_{3}|={3}|-{3})"
)
_LABEL = re.compile(r"[A-Za-z][\w/&'()-]{0,25}(?: [\w/&'()-]{1,25}){0,4}:(?:\s|$)")
_NUMBER_MARK = re.compile(r"(?:^|[\s(])(\d{1,2})[.)](?=\s|$)", re.MULTILINE)
_NUMBER_AT_END = re.compile(r"(?:^|[.,;:)]\s{1,4})\(?(\d{1,2})[.)]$")
# No sentence or list item ends in one of these
_UNFINISHED = frozenset(
    "a an the of and or but nor with without for to from by at as than that which who whose his her their its"
    " is are was were be been being has have had having into onto upon about between under over during"
    " because if when while since although this these no not very vs".split()
)
_BEFORE_NAMES = frozenset("dr mr mrs ms prof vs e.g i.e approx".split())
_BEFORE_NOUNS = frozenset("a an the of and or nor with without for his her their its than vs".split())


def wrapped_newlines(text: str) -> set[int]:
    """The positions of the newlines inside sentences.

    A program that wraps lines breaks one only where its next word would not have fit. If most such full lines
    of a text go on in the next line, as words and small letters show, then all full lines do, also before a
    name or a number. Elsewhere a line goes on only where its own end or the next line's beginning shows it.
    """
    # Old transcriptions are in capitals throughout
    lower = text.lower()
    lines = (lower if text.isupper() and len(lower) == len(text) else text).split("\n")
    stripped = [line.strip() for line in lines]
    width = _width(lines)
    # "2." begins an item if there is a "1.", which "at age" / "60. Both" has not
    numbers = {0, *map(int, _NUMBER_MARK.findall(text))}
    goes_on = []
    is_full = []
    n_wrapped = n_listed = 0
    for line, here, after in zip(lines, stripped, stripped[1:]):
        is_break = not here or not after or _begins_item(here, after, numbers)
        first_word = after[: width + 1].split(None, 1)[0] if after else ""
        full = not is_break and len(line.rstrip()) + 1 + len(first_word) > width
        more = not is_break and _shows_more(here, after, numbers)
        # Lines that end with a period or begin with a name say nothing about the others
        if not is_break and here[-1] not in ".!?:":
            n_wrapped += full and (more or after[0].islower())
            n_listed += not full
        goes_on.append(more)
        is_full.append(full)
    is_wrapped = width in _WIDTHS and n_wrapped > n_listed and 3 * n_wrapped >= sum(is_full)
    positions = set()
    position = -1
    for line, more, at_width in zip(lines, goes_on, is_full):
        position += len(line) + 1
        if more or (is_wrapped and at_width):
            positions.add(position)
    return positions


def _width(lines: list[str]) -> int:
    """The column that the text seems to be wrapped at; more than any of _WIDTHS if it is not wrapped."""
    lengths = [len(line.rstrip()) for line in lines]
    within = [length for length in lengths if length <= _WIDTHS[-1]]
    # A table or an address may be longer than the rest
    is_wrapped = len(lengths) - len(within) <= len(lengths) // 10
    return max(within) if is_wrapped else _WIDTHS[-1] + 1


def _begins_item(here: str, after: str, numbers: set[int]) -> bool:
    """Whether a list item, a heading or a turn of a dialogue begins in the line `after`."""
    item = _ITEM.match(after)
    if item and item["number"]:
        # "7 out of" / "2. He also"
        return int(item["number"]) - 1 in numbers and _last_word(here) not in _UNFINISHED
    is_label = after[0].isupper() and _LABEL.match(after) is not None
    return item is not None or (is_label and _last_word(here) not in _BEFORE_NOUNS)


def _shows_more(here: str, after: str, numbers: set[int]) -> bool:
    """Whether the words show that the line `here` goes on in the line `after`."""
    word = _last_word(here)
    if here[-1] == ".":
        # "Dr." / "Smith", and "Mild anemia. 3." / "Gout."
        number = _NUMBER_AT_END.search(here[-10:])
        is_mark = number is not None and len(here) > 4 and int(number[1]) - 1 in numbers
        return is_mark or (word.lower() in _BEFORE_NAMES and len(here) > len(word) + 1)
    if here[-1] in "!?:;":
        return False
    # "smoker: no" is an answer, "has no" is not
    is_unfinished = word in _UNFINISHED and here[: -len(word)].rstrip()[-1:] not in (":", "")
    if after[0].islower():
        is_label = _LABEL.match(after) is not None
        return is_unfinished or here[-1] in ",(" or (len(here) >= _LONG and not is_label)
    return (word in _BEFORE_NOUNS and len(here) >= 15) or (here[-1] == "," and len(here) >= _WIDTHS[0])


def _last_word(line: str) -> str:
    return line[-30:].rsplit(None, 1)[-1].strip("([\"'.")
