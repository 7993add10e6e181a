"""Splits clinical text into sentences and numbers them S1, S2, ..., as summaries cite them.

An adapter trained on numbered notes depends on the numbering, so its rules have a version, saved with the
adapter. Change them only together with a new version, and keep the old one, as sentences_v1.py does."""

import re

from sft.grounding import sentences_v1
from sft.grounding.lines import wrapped_newlines

SENTENCE_VERSION = 2  # of new trainings; 1 = as written by format 1 and 2

# A period, question or exclamation mark (and closing quotes or brackets) before white space; a line's end;
# the place before the number of a list item on the same line ("Asthma, 2. Gout"). Exports that replace line
# ends by commas write "Asthma., Gout."
_BOUNDARY = re.compile(
    r"""(?P<mark>[.!?…])(?P<closing>["'”’)\]]*+)(?P<comma>,?)(?=\s|(?<=\.,)\(?\d{1,2}[.)]\s)|(?P<newline>\n)"""
    r"""|[,;:](?=[ \t]{1,4}\(?(?P<number>\d{1,2})[.)][ \t]{1,4}[^\W\d])"""
)
# At the beginning of a sentence: "1.", "(2.", "1.2.", "a.", "iv.", also after a bullet
_LIST_MARK = re.compile(
    r"(?:[-*•·–—+>]\s{0,4})?\(?(?:\d{1,3}(?:\.\d{1,3}){0,3}|[A-Za-z]|[ivx]{2,4}|[IVX]{2,4})"
)
_ITEM = re.compile(r"[A-Z]|\(?\d{1,2}[.)]\s")
_SPEAKER = re.compile(r"[A-Za-z][\w ]{0,30}:\s{0,4}")
# Never the end of a sentence. "MR." and "ms." may be mitral regurgitation and milliseconds: these need a name
_NEVER_END = frozenset("dr drs mrs prof st vs eg ie e.g i.e cf approx incl fig figs viz".split())
_TITLES = frozenset("mr ms".split())
# The end only if a capital or a digit follows
_ABBREVIATIONS = frozenset(
    "pt pts hx dx tx rx sx fx yo yr yrs wk wks mo mos hr hrs min mins sec secs dept inc etc temp resp wt ht"
    " neg pos abd ext amt avg max vol jr sr tab tabs cap caps inj susp supp oint syr gtt gtts"
    " bid tid qid qd prn jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_BEFORE_NUMBERS = frozenset(
    "jan feb mar apr jun jul aug sep sept oct nov dec temp resp wt ht avg max vol amt".split()
)
_FORMS = frozenset("tab tabs cap caps inj susp supp oint syr".split())  # "Tab. Aspirin 75 mg"
_UNITS = frozenset("mg mcg ug g gm gms kg ml cc l cm mm u units iu meq mmol".split())
_ROUTES = frozenset("p.o i.v i.m s.c s.l p.r".split())
# What goes on after "5 mg."
_DOSING = re.compile(
    r"(?:[a-z]\.){2}|(?:po|iv|im|sc|sl|pr|bid|tid|qid|qd|qhs|prn|q\.?\d+|q|od|bd|tds|hs|stat|daily|every|each"
    r"|per|once|twice|three|four|at|by|with|for|in|as|to|and|or)\b",
    re.IGNORECASE,
)
_DOSING_IN_CAPITALS = re.compile(r"(?:[A-Z]\.){2,4}|(?:PRN|QHS|BID|TID|DAILY|Q\S*\d)\W?")
_DOTTED = re.compile(r"(?:[A-Za-z]{1,2}\.){1,4}[A-Za-z]")  # b.i.d, p.o, a.m, Ph.D
_FREQUENCY = re.compile(r"q\.?\d{1,2}(?:-\d{1,2})?(?:h|hr|hrs|d|wk)?", re.IGNORECASE)  # q.4-6h, q12h
_VALVE = frozenset("mild moderate severe trace trivial no significant mild-moderate".split())
# Words before a letter that is no initial of a name: "hepatitis C. Cirrhosis"
_LETTERED = frozenset(
    "hepatitis influenza vitamin type group grade class stage lead factor protein plan option part point".split()
)
# Words that begin a sentence, so that the letter before them is no initial of a name
_STARTERS = frozenset(
    "he she it we they i you the a an his her their this that these there patient no denies normal recent"
    " also will has had was is in on at for if as when after before since then continue start one two three"
    " unfortunately however today yesterday currently do does did are can could what how why where who".split()
)
_LOOKBACK = 40  # characters; no abbreviation is longer


def sentence_spans(text: str, version: int = SENTENCE_VERSION) -> list[tuple[int, int]]:
    """(start, end) of every sentence of `text`, in order, without overlap, by the rules of `version`.

    Together they hold every visible character. Made for clinical notes: list items, headings and dialogue
    turns are sentences of their own, wrapped lines are joined, decimal points and common abbreviations do not
    end a sentence. Time and memory are linear in the text."""
    boundaries = sentences_v1.boundaries if version == 1 else _boundaries
    ends = [*boundaries(text), len(text)]
    spans = []
    for start, end in zip([0, *ends], ends):
        sentence = text[start:end].strip()
        if sentence:
            start += text[start:end].index(sentence)
            spans.append((start, start + len(sentence)))
    return spans


def split_sentences(text: str, version: int = SENTENCE_VERSION) -> list[str]:
    """The sentences of `text`, each on one line (inner white space folded)."""
    return [" ".join(text[start:end].split()) for start, end in sentence_spans(text, version)]


def number_sentences(text: str, version: int = SENTENCE_VERSION) -> list[str]:
    """["S1: first sentence", ...]: the lines of a note as an evidence-trained model reads it."""
    return [f"S{number}: {sentence}" for number, sentence in enumerate(split_sentences(text, version), 1)]


# ------------------------------------------------------------------------------- version 2


def _boundaries(text: str) -> list[int]:
    """Where the sentences of `text` end, in order, without its end."""
    wrapped = wrapped_newlines(text)
    # "Gravida: 1. Para: 2." is no list
    has_second = re.search(r"[.,;]\s{1,4}\(?2[.)]\s", text) is not None
    ends = []
    start = 0
    last_item = 0  # the number of the list item that the sentence is in or follows
    asked = False  # whether the sentence before is a question
    for match in _BOUNDARY.finditer(text):
        end = match.end()
        following = text[end : end + _LOOKBACK].lstrip()
        if match["newline"]:
            is_end = match.start() not in wrapped
        elif match["number"]:
            # "1. Asthma, 2. Gout" or "Asthma, 2. Gout", but not "on March 3, 14. He"
            number = int(match["number"])
            is_end = has_second and (number == last_item + 1 or (number == 2 and last_item == 0))
            last_item = number if is_end else last_item
        elif match["comma"] and not _ITEM.match(following):
            is_end = False
        elif match["mark"] == ".":
            is_end, item = _period_ends_sentence(text, start, match, wrapped, asked)
            last_item = item or last_item
        else:
            # 'He asked "Why?" and left', "Well... yes"
            is_end = not ((match["closing"] or match["mark"] == "…") and following[:1].islower())
        if is_end:
            # Blank lines do not part an answer from its question
            if text[start:end].strip():
                asked = match["mark"] == "?"
            start = end
            ends.append(end)
    return ends


def _period_ends_sentence(
    text: str, start: int, match: re.Match, wrapped: set[int], asked: bool
) -> tuple[bool, int]:
    """(whether the sentence that begins at `start` ends at this period, the number of the list item that it
    marks or 0)."""
    end = match.end()
    # What has been said on this line; `start` may be thousands of characters back
    before = text[max(start, match.start() - _LOOKBACK) : match.start()]
    is_whole = start >= match.start() - _LOOKBACK
    beginning = before.lstrip() if is_whole else ""
    after = text[end : end + _LOOKBACK]
    following = after.lstrip()
    newline = text.find("\n", end, end + len(after) - len(following))
    if not following or (newline >= 0 and newline not in wrapped):
        return True, 0
    # "1. Diabetes": the number of a list item, with text on the same line
    is_mark = is_whole and not match["closing"] and _LIST_MARK.fullmatch(beginning)
    if is_mark and not (asked and beginning.isdigit()):
        return False, int(re.sub(r"\D", "", beginning.rpartition(".")[2]) or 0)
    words = before.split()
    word = words[-1].lstrip("([\"'") if words else ""
    previous = words[-2] if len(words) > 1 else ""
    return not _goes_on(word, previous, following, beginning, asked), 0


def _goes_on(word: str, previous: str, following: str, beginning: str, asked: bool) -> bool:
    """Whether the sentence goes on after "`previous` `word`." and before `following`."""
    lower = word.lower()
    next_is_lower = following[0].islower()
    next_is_digit = following[0].isdigit()
    is_first = beginning in (word, f"({word}")
    # "room no. 4", but "Any pain? No. 4 days ago it stopped"
    if lower == "no":
        is_answer = (is_first and asked) or _SPEAKER.fullmatch(beginning.removesuffix(word))
        return next_is_digit and not is_answer
    if lower in _NEVER_END:
        return True
    if lower in _TITLES:
        is_measure = previous.lower() in _VALVE or previous[:1].isdigit()
        return is_first or (word[1:].islower() and not is_measure)
    if lower in _UNITS or _FREQUENCY.fullmatch(word):
        return _DOSING.match(following) is not None and (next_is_lower or word in ("MG", "ML"))
    if next_is_digit and (lower in _ROUTES or lower in _FORMS or lower in _BEFORE_NUMBERS):
        return True
    if lower in _FORMS and (is_first or (word[0].isupper() and not word.isupper())):
        return True
    if lower in _ABBREVIATIONS or _DOTTED.fullmatch(word):
        # Nothing but an abbreviation is no sentence: "J.R. Smith"
        is_alone = is_first and not next_is_digit
        # "METFORMIN 500 MG P.O. B.I.D. PRN"
        is_dosing = "." in word and _DOSING_IN_CAPITALS.fullmatch(following.split(None, 1)[0])
        return next_is_lower or is_alone or bool(is_dosing)
    if len(word) == 1 and word.isupper():
        return next_is_lower or _is_initial(previous, following)
    # "Well... yes"
    return word.endswith("..") and next_is_lower


def _is_initial(previous: str, following: str) -> bool:
    """Whether a capital letter and a period before `following` belong to a name: "John D. Smith"."""
    next_word = re.split(r"\W", following, maxsplit=1)[0]
    if not next_word[:1].isupper() or next_word.lower() in _STARTERS:
        return False
    lower = previous.lower()
    is_name = previous[1:].islower() and previous[:1].isupper() and lower not in _LETTERED
    is_title = lower == "by" or lower.rstrip(".") in _NEVER_END | _TITLES
    return is_name or is_title or re.fullmatch(r"[A-Z]\.", previous) is not None
