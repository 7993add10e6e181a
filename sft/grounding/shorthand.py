"""Shorthand and what it stands for, so that "29F, 3/52" and "29-year-old, three weeks" compare equal."""

import re
from collections.abc import Mapping, Sequence

# Short forms of any note, and what a summary may say for each; what has two meanings is not here
_TABLE = """
pt=patient|hx=history|dx=diagnosis|bp=blood pressure|rr=respiratory rate|temp=temperature|htn=hypertension
c/o=complains of,complaining of,reports|sob=shortness of breath|cxr=chest x-ray,chest radiograph|abx=antibiotics
bd bid=twice daily,twice a day|tds tid=three times daily,three times a day|qds qid=four times daily,four times a day
prn=as needed|iv=intravenous,intravenously|po=by mouth,orally,oral|f/u=follow-up
"""
SHORTHAND = {
    short: words.split(",")
    for shorts, words in (row.split("=") for row in re.split(r"[|\n]", _TABLE.strip()))
    for short in shorts.split()
}
_SPELLED_OUT = [
    (re.compile(pattern), to)
    for pattern, to in [
        (r"\b(\d{1,3})[\s-]{0,3}(?:[Yy]ears?|[Yy]rs?)[\s-]{0,3}old\b", r"\1 yearold "),
        (r"\b(\d{1,3})\s?(?:[Yy]/?[Oo]|[Yy])\b|\b[Aa]ged (\d{1,3})\b", r"\1\2 yearold "),
        (
            r"\b(\d{1,3})(?:\s?yearold\s{0,2})?F\b(?!\s(?:catheter|foley|drain|sheath|stent|tube)\b)",
            r"\1 yearold woman ",
        ),
        (r"\b(\d{1,3})(?:\s?yearold\s{0,2})?M\b", r"\1 yearold man "),
        (r"\b[Tt]his\s{1,3}(?=\d{1,3} yearold)", "a "),
        (r"(?<![\d/.])(\d{1,2})/7\b", r"\1 days"),
        (r"(?<![\d/.])(\d{1,2})/52\b", r"\1 weeks"),
        (r"(?<![\d/.])(\d{1,2})/12\b", r"\1 months"),
        (r"\b(?:[Aa]n?|[Oo]ne) (hour|day|week|fortnight|month|year)\b", r"1 \1"),
        (r"(?<![\d/])(?<!\d )\bR\b(?!/|\s\d+\b)|\bRt\b", "right"),
        (r"(?<![\d/])(?<!\d )\bL\b(?!/|\s\d+\b)|\bLt\b", "left"),
        # "Flu A+, nitrites -."
        (r"(?<=\w)\s?\+{1,4}(?=\s?(?:[,.;)]|$))", " positive"),
        (r"(?<=\w)\s?[-–−](?=\s?(?:[,.;)]|$))", " negative"),
        (r"(?<=[a-z]\s)A\b", "typea"),
        (r"(?<=\w )May\b|\bMay(?= \d)", "monthmay"),
        (r"\bHR\b", "heart rate"),
        # Prothrombin time or physical therapy, hepatic encephalopathy
        (r"\b(PT|HE|IS|AT|WHO|HIS)\b", r"\1s"),
        (r"\?\s?(?=\w)", " possible "),
        (r"-{1,2}>|→|(?<=\d)\s?[-–]\s?(?=\d)", " to "),
        (r"(?<=\w)[-–](?=[^\W\d])", " "),
        (r"\+ve\b", "positive"),
        (r"(?<!\w)-ve\b", "negative"),
        (r"(?<=\s)[-–−](?=\d)", " minus "),
        (r"(?<!\d)\+|&", " and "),
        (r"\bw/(?!o)\s?", "with "),
    ]
]
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_SAME = {word: str(n) for n, word in enumerate(_NUMBERS)} | {
    word: group.split()[0]
    for group in "woman lady female|man gentleman male|no without nil denies denied deny|hour hr hrs|minute min mins|"
    "week wk wks|month mo|year yr yrs|mcg micrograms microgram ug|ml mls|g gram grams|mg milligrams|% percent|"
    "possible query suspected possibly|both bilateral|anymore longer|show showed".split("|")
    for word in group.split()
}


def spell_out(text: str) -> str:
    """The text with ages, sexes, sides, times and marks of shorthand in one form."""
    for pattern, to in _SPELLED_OUT:
        text = pattern.sub(to, text)
    return text


def key(word: str) -> str:
    """A word as it is compared: number, group of short forms, without a plural or a third person's s."""
    word = word.replace("’", "'").removesuffix("'s")
    word = _SAME.get(word, word)
    if word[:1].isdigit():
        digits = word.replace(",", "") if re.fullmatch(r"\d{1,3}(?:,\d{3})+", word) else word
        return f"{float(digits[:30]):g}" if re.fullmatch(r"\d+\.\d+", digits) else digits
    if len(word) < 4:
        return word
    word = word.replace("ae", "e").replace("oe", "e") if len(word) > 5 else word
    word = re.sub(r"(?<=..)ies$", "y", word)
    return _SAME.get(word, re.sub(r"(?<=[^sui])s$", "", word))


def use_short_forms(sentence: str, words: set[str], shorthand: Mapping[str, Sequence[str]]) -> str:
    """The sentence with the part's short forms in place of what stands for them."""
    for table in (SHORTHAND, shorthand):
        for short in table.keys() & words:
            forms = sorted(filter(None, table[short] or ()), key=len, reverse=True)
            long = "|".join(map(re.escape, forms))
            # An entry may have been emptied
            sentence = re.sub(rf"\b(?:{long})\b", short, sentence, flags=re.IGNORECASE) if long else sentence
    return sentence
