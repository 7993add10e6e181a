"""Texts that are no note in plain words: markup, which is removed; messages between systems, one word,
another language.

The patterns are linear in the text. html.parser is not (Python 3.11 takes minutes for 100,000 characters of
unclosed tags), nor is striprtf, so RTF is only warned of."""

import html
import re
from collections import Counter
from collections.abc import Sequence

# What a text is by its beginning
_JSON = r'(?:\{\s*"[^"\n]*"\s*:|\[\s*[\[{]\s*[\[{"])'
_FORMATS = (
    (r"\{\\rtf", "RTF"),
    (r"%PDF-", "PDF"),
    (r"(?:MSH|FHS|BHS|MSA|EVN|PID|PV1|ORC|OBR|OBX|NTE|TXA)\|[^|\n]*\|", "an HL7 v2 message"),
    (rf'{_JSON}(?s:.*)"resourceType"|\{{\s*"resourceType"', "JSON (FHIR?)"),
    (_JSON, "JSON"),
)
_BLOCKS = "p|br|hr|div|h[1-6]|li|ul|ol|dl|dt|dd|tr|table|tbody|thead|html|body|head|title|pre|blockquote"
_BLOCKS_OF_XML = "caption|section|component|text|paragraph|list|item"
_INLINE = "td|th|meta|span|font|b|i|u|em|strong|sup|sub|small|center|a|img|style|script"
# Nothing, or attributes: "<a few and >b" is no tag
_END = r"(?:\s*/?>|\s[^<>=]*=[^<>]*>)"
_HTML_TAG = re.compile(rf"</?(?:{_BLOCKS}|{_INLINE}){_END}|<!doctype\b[^<>]*>", re.IGNORECASE)
# One such tag is enough; <b> and <i> may be placeholders
_SURE_TAG = re.compile(rf"<(?:/\w+|p|br|hr|div|span|html|body|table|h[1-6]|ul|ol|li){_END}", re.IGNORECASE)
_END_TAG = re.compile(r"</[A-Za-z_][\w:.-]*\s*>")
_XML_START = re.compile(r"<\?xml\b(?!.{0,300}<html)|<(\w+:)?ClinicalDocument\b", re.IGNORECASE | re.DOTALL)
_ENTITY = re.compile(r"&(?:nbsp|amp|lt|gt|quot|apos|deg|#\d{2,6}|#x[\da-f]{2,5});", re.IGNORECASE)
_HIDDEN = (("<!--", "-->"), (r"<style\b", r"</style\s*>"), (r"<script\b", r"</script\s*>"))
# What stands in the place of tags: lines, spaces, nothing
_BLOCK_TAG = (rf"</?(?:{_BLOCKS}|{_BLOCKS_OF_XML}){_END}", "\n")
_REPLACED = {
    "HTML": (_BLOCK_TAG, (rf"</?t[dh]{_END}", " "), (_HTML_TAG.pattern, "")),
    "XML": ((r"<!\[CDATA\[|\]\]>", ""), _BLOCK_TAG, (rf"</?[A-Za-z_][\w:.-]*{_END}|<[?!][^<>]*>", " ")),
}
_RULER = re.compile(r"^[-=]{20,}$", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]+")
_BEYOND_LATIN = re.compile(r"[\u0370-\u1dff\u2c00-\ud7ff\uf900-\uffef]")
_MOST_CHARACTERS = 20_000  # of a text are looked at
_MOST_FOR_LANGUAGE = 1_000
_MOST_NOTES = 1_000  # evenly chosen ones tell the language of all
# Words that nearly every text in the language has and none of the others; "no" and "in" belong to several
_FUNCTION_WORDS = {
    "en": "the and with was has is of for his her she he not without since after from are were you have",
    "de": "der die das und mit ist nicht ein eine einen wurde wird bei seit nach auf sich dem den keine über",
    "fr": "le les des et avec est une du dans pas sans pour depuis qui sur au aux ses elle il",
    "es": "el los las y con una del por para sin se su desde fue presenta que al como pero muy",
    "it": "il gli della con una per non che è di del nel alla dopo senza stato anche sono ha lo",
    "pt": "o os das dos com uma não para sem foi há ao pela pelo mais nos nas em seu sua",
    "sv": "och är för inte på att som ett utan från sedan vid hon eller även",
    "da": "og er ikke på til af det hun uden siden også ingen kan",
    "pl": "się nie jest przez oraz bez dla był była ze jako który są też lub",
    "tr": "ve bir ile için olan değil sonra olarak yok çok daha gibi üç gün önce",
    "fi": "ja ei oli hän että mutta sekä kuin joka myös ole ilman jälkeen kanssa",
    "nl": "het een van met niet voor zijn geen naar bij ook werd wordt sinds maar op heeft en dat zij",
}
_FUNCTION_WORDS = {language: frozenset(words.split()) for language, words in _FUNCTION_WORDS.items()}
_MIN_FUNCTION_WORDS = 4  # different ones, or the language is unknown: telegraphic notes have few
_MIN_ALONE = 3  # where no word is another language's
_MIN_WORDS = 8  # without a function word of English
_ACCENTED = re.compile(r"[\u00df-\u024f\u1e00-\u1eff]")


def strip_markup(text: str) -> tuple[str, str | None]:
    """(the text of HTML or XML without tags, "HTML" or "XML"), or (`text`, None) if it is neither. Tags that
    HTML does not have stay: "plt <a few and >b" is no tag."""
    if not ("<" in text or "&" in text) or _other_format(text):
        return text, None
    plain = text
    kind = _find_markup(text)
    if kind is None and _ENTITY.search(text):
        # "&lt;p&gt;" is HTML that was escaped once more; "&gt; 38&deg;C" has no tags
        plain = html.unescape(text).replace("\xa0", " ")
        kind = _find_markup(plain)
    if kind:
        # Before the last end, so that every start finds one, in linear time
        for start, end in _HIDDEN:
            last = max((match.end() for match in re.finditer(end, plain, re.IGNORECASE)), default=0)
            plain = (
                re.sub(f"{start}.*?{end}", "", plain[:last], flags=re.IGNORECASE | re.DOTALL) + plain[last:]
            )
        for pattern, replacement in _REPLACED[kind]:
            plain = re.sub(pattern, replacement, plain, flags=re.IGNORECASE)
        lines = html.unescape(plain).split("\n")
        plain = "\n".join(filter(None, (" ".join(line.split()) for line in lines)))
    return (plain, kind or "HTML") if plain != text else (text, None)


def _find_markup(text: str) -> str | None:
    start = text[:_MOST_CHARACTERS].lstrip("\ufeff \t\r\n")
    if _XML_START.match(start):
        return "XML"
    if not _SURE_TAG.search(start) and len(_HTML_TAG.findall(start)) < 2:
        return None
    # Placeholders such as <name> have no end, so the ends tell
    ends = [bool(_HTML_TAG.match(end)) for end in _END_TAG.findall(start)]
    is_html = _HTML_TAG.search(start) and (not ends or 2 * sum(ends) > len(ends))
    return "HTML" if is_html or re.match(r"<!doctype html", start, re.IGNORECASE) else "XML"


def _other_format(text: str) -> str | None:
    """What a text is that is neither a note nor markup."""
    start = text[:_MOST_CHARACTERS].lstrip("\ufeff \t\r\n\x0b")
    return next((name for pattern, name in _FORMATS if re.match(pattern, start)), None)


def kind_of_file(start: str) -> str | None:
    """What a file that begins so is, if no CSV: "RTF", "HTML", "JSON" and so on."""
    start = start.lstrip("\ufeff \t\r\n")
    kind = _find_markup(start) if start.startswith("<") else _other_format(start)
    return kind or ("JSON" if start.startswith(("{", "[")) else None)


def describe_problem(text: str, language: str | None = None) -> str | None:
    """Why a text is hardly a note, as in "looks like RTF"; None if nothing is wrong. Never words of the text.

    With `language`, that of the training notes (`find_language`), another one is a problem too."""
    kind = _other_format(text) or _find_markup(text)
    start = text[:_MOST_CHARACTERS].strip()
    if not kind and len(_RULER.findall(start)) > 2:
        kind = "a printed record (Synthea?)"
    if kind:
        return f"looks like {kind}"
    # Chinese and others put no spaces between words
    if len(start.split(maxsplit=1)) == 1 and not _BEYOND_LATIN.search(start):
        return "is a single word"
    found = find_language(start, language) if language else None
    return "is in another language than the training notes" if found not in (None, language) else None


def find_language(text: str, expected: str | None = None) -> str | None:
    """The language whose function words a text has, twice as many as any other's; None if there are too few
    of them to tell. "?" in another script or, where English is `expected`, in words that it has not."""
    text = text[:_MOST_FOR_LANGUAGE]
    if not text.isascii() and 2 * len(_BEYOND_LATIN.findall(text)) > len(re.sub(r"[\W\d_]", "", text)):
        return "?"
    words = set(_WORD.findall(text))
    lower = {word.lower() for word in words}
    counts = {language: len(lower & function_words) for language, function_words in _FUNCTION_WORDS.items()}
    second, first = sorted(counts, key=counts.get)[-2:]
    if counts[first] >= (max(_MIN_FUNCTION_WORDS, 2 * counts[second]) if counts[second] else _MIN_ALONE):
        return first
    # Names are capitalized, and may be accented in English too
    uncapitalized = [word for word in words if word.islower()]
    is_other = expected == "en" and not counts["en"] and len(uncapitalized) >= _MIN_WORDS
    return "?" if is_other and sum(map(bool, map(_ACCENTED.search, uncapitalized))) > 1 else None


def main_language(texts: Sequence[str]) -> str | None:
    """That of most texts whose language can be told; None if it can be told of fewer than half of them."""
    found = Counter(map(find_language, texts[:: max(1, len(texts) // _MOST_NOTES)]))
    language, count = max(found.items(), key=lambda item: item[1], default=(None, 0))
    return language if 2 * count > found.total() else None
