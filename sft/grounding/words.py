"""Words of clinical English: tokens, stems, content words, English or not; the lists are in lexicon.txt.

A stem stands for the forms and the plain synonyms of a word (kidney, renal), so that notes and summaries can
be compared word by word."""

import re
from functools import lru_cache
from pathlib import Path

TOKEN = re.compile(
    r"(?<![\w.])\.\d+|(?<!\w)[a-z]/[a-z](?!\w)|\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)*|[^\w\s]"
)
_SUFFIXES = re.compile(
    r"(?:ically|ation|ations|ements?|ingly|ities|ings?|edly|ness|ously|ious|ous|ives?|ally|ical|ies|ied|ers?|ors?|"
    r"ions?|als?|ics?|ed|es|ly|ity|e|s|y|i)$"
)


def _read_lexicon() -> dict[str, str]:
    text = Path(__file__).with_name("lexicon.txt").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    return {name: words.strip() for name, words in re.findall(r"^\[(.+)\]\n([^\[]*)", text, re.MULTILINE)}


LEXICON = _read_lexicon()


def word_set(name: str) -> frozenset[str]:
    """The words of a section of the lexicon."""
    return frozenset(LEXICON[name].split())


def groups(name: str) -> dict[str, str]:
    """{word: first word of its group} of a section of the lexicon."""
    return {word: group.split()[0] for group in LEXICON[name].split("|") for word in group.split()}


_STOP_WORDS = word_set("stop")
_REPORTING = word_set("reporting")
_OTHER_LANGUAGES = word_set("other languages") - _STOP_WORDS


def _strip(word: str) -> str:
    """The word without its endings, and in American spelling."""
    if len(word) > 5:
        word = word.replace("ae", "e").replace("oe", "e")
    for _ in range(2):
        shorter = _SUFFIXES.sub("", word)
        if len(shorter) < 3 or (len(word) <= 4 and word[-1] != "s"):
            break
        word = shorter
    return word


_GROUPS = {form: name for word, name in groups("synonyms").items() for form in (word, _strip(word))}


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """The stem of a lower-case word, or the first word of its group of synonyms."""
    word = word.replace("'", "")
    return _GROUPS.get(word) or _GROUPS.get(_strip(word)) or _strip(word)


def is_content(word: str) -> bool:
    """Whether a lower-case word carries meaning of its own. Numbers do not; of letters, K for potassium."""
    return (len(word) > 1 or word == "k") and word[0].isalpha() and word not in _STOP_WORDS


@lru_cache(maxsize=50_000)
def is_telling(word: str) -> bool:
    """A content word that is not one of those with which every summary reports."""
    return len(word) > 1 and is_content(word) and word not in _REPORTING


def bare_words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return [word for word in TOKEN.findall(text.lower()) if word[0].isalnum()]


def content_stems(text: str, numbers: bool = True) -> list[str]:
    """The stems of the content words and, as they are, the `numbers`: in order, repeated as there."""
    words = TOKEN.findall(text.lower())
    return [stem(word) for word in words if is_content(word) or (numbers and word[0].isdigit())]


def detect_language(text: str) -> str:
    """ "en" or "other", by English stop words against those of other languages.

    Text too short or too telegraphic to tell counts as English."""
    words = [word for word in TOKEN.findall(text[:20_000].lower()) if word[0].isalpha()]
    if sum(word[0] > "ɏ" for word in words) > len(words) / 2:
        return "other"
    n_english = sum(word in _STOP_WORDS for word in words)
    n_other = sum(word in _OTHER_LANGUAGES for word in words)
    has_no_english = len(words) >= 40 and n_english < 0.02 * len(words)
    return "other" if has_no_english or n_other > max(1, n_english) else "en"
