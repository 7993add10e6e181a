"""Texts that are no note in plain words: markup, messages between systems, one word, another language."""

import json
import re
from collections import Counter
from collections.abc import Sequence

_HTML_TAG = re.compile(
    r"</?(?:html|body|div|p|br|span|table|tr|td|th|ul|ol|li|b|i|h[1-6])\b[^<>]{0,200}>", re.IGNORECASE
)
_STARTS = (
    ("{\\rtf", "RTF"),
    ("MSH|", "an HL7 v2 message"),
    ("<?xml", "XML (CDA?)"),
    ("<ClinicalDocument", "XML (CDA?)"),
    ("%PDF-", "PDF"),
)
_WORD = re.compile(r"[^\W\d_]+")
_BEYOND_LATIN = re.compile(r"[\u0370-\u1dff\u2c00-\ud7ff\uf900-\uffef]")
_MOST_CHARACTERS = 20_000  # of a text are looked at
_MOST_FOR_LANGUAGE = 1_000
_MOST_NOTES = 1_000  # evenly chosen ones tell the language of all
# Words that nearly every text in the language has and none of the others; "no" and "in" belong to several
_FUNCTION_WORDS = {
    "en": "the and with was has is of for his her she he not without since after from are were you have",
    "de": "der die das und mit ist nicht ein eine einen wurde wird bei seit nach auf sich dem den keine",
    "fr": "le les des et avec est une du dans pas sans pour depuis qui sur au aux ses elle il",
    "es": "el los las y con una del por para sin se su desde fue presenta que al como pero muy",
    "it": "il gli della con una per non che è di del nel alla dopo senza stato anche sono ha lo",
    "pt": "o os das dos com uma não para sem foi há ao pela pelo mais nos nas em seu sua",
    "nl": "het een van met niet voor zijn geen naar bij ook werd wordt sinds maar op heeft en dat zij",
}
_LANGUAGE_OF = {
    word: [name for name, words in _FUNCTION_WORDS.items() if word in words.split()]
    for words in _FUNCTION_WORDS.values()
    for word in words.split()
}
_MIN_FUNCTION_WORDS = 4  # different ones, or the language is unknown: telegraphic notes have few


def describe_problem(text: str, language: str | None = None) -> str | None:
    """Why a text is hardly a note, as in "looks like RTF"; None if nothing is wrong. Never words of the text.

    With `language`, that of the training notes (`find_language`), another one is a problem too.
    """
    start = text[:_MOST_CHARACTERS].lstrip("\ufeff \t\r\n")
    for mark, name in _STARTS:
        if start.startswith(mark):
            return f"looks like {name}"
    if len(_HTML_TAG.findall(start)) >= 2:
        return "looks like HTML"
    if start[:1] in ("{", "[") and _is_json(text, start):
        return "looks like JSON (FHIR?)" if '"resourceType"' in start else "looks like JSON"
    # Chinese and others put no spaces between words
    if len(start.split(maxsplit=1)) == 1 and not _BEYOND_LATIN.search(start):
        return "is a single word"
    found = find_language(start) if language else None
    return "is in another language than the training notes" if found not in (None, language) else None


def _is_json(text: str, start: str) -> bool:
    if len(start) >= _MOST_CHARACTERS:
        return bool(re.match(r'[\[{]\s*[\[{"]', start))
    try:
        return isinstance(json.loads(text), dict | list) and '"' in start
    except (ValueError, RecursionError):
        return False


def find_language(text: str) -> str | None:
    """The language whose function words a text has, twice as many as any other's; "?" in another script; None
    if there are too few of them to tell."""
    text = text[:_MOST_FOR_LANGUAGE]
    if not text.isascii() and 2 * len(_BEYOND_LATIN.findall(text)) > len(re.sub(r"[\W\d_]", "", text)):
        return "?"
    counts = dict.fromkeys(_FUNCTION_WORDS, 0)
    for word in set(_WORD.findall(text.lower())):
        for name in _LANGUAGE_OF.get(word, ()):
            counts[name] += 1
    second, first = sorted(counts, key=counts.get)[-2:]
    is_clear = counts[first] >= max(_MIN_FUNCTION_WORDS, 2 * counts[second])
    return first if is_clear else None


def main_language(texts: Sequence[str]) -> str | None:
    """That of most texts whose language can be told; None if it can be told of fewer than half of them."""
    found = Counter(map(find_language, texts[:: max(1, len(texts) // _MOST_NOTES)]))
    language, count = max(found.items(), key=lambda item: item[1], default=(None, 0))
    return language if 2 * count > found.total() else None
