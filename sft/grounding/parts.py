"""Parts of a note from which single sentences of a summary are written, and training pairs of that form."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sft.grounding.citations import strip_citations
from sft.grounding.selector import Quoted, cover
from sft.grounding.sentences import split_sentences
from sft.grounding.shorthand import spell_out
from sft.grounding.structure import read_units, shown_label
from sft.grounding.words import TOKEN, is_telling, stem

# Share of a summary sentence's words that its part must hold; a number must always stand there
_COVERED = 0.85
# Where a summary sentence may be cut in two, and what makes a sentence of a piece
_IS = r"(?=(?:[\w’'-]+\s+){1,6}?(?:is|are|was|were|has|have|had|will)\b)"
_CUT = re.compile(rf"(;\s+|,\s+(?:and|but|so)\s+{_IS}|\s+(?:and|but)\s+(?=(?:she|he|the|her|his)\s){_IS})")
_TAIL = re.compile(r",\s|\s+(?:with|and|after|for|because|so)\s")
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|will|shows?|takes?|starts?|started|continues?|reports?|admitted|came|remains?|needs?|\w{3,}ed)\b"
)
_WHO = re.compile(
    r"\b\d{1,3}(?:[\s-](?:year|yr|month|week|day)s?[\s-]old|\s?y/?o\b|\s?y\b|\s?[FM]\b)(?:[\s/]*\b(?:F|M|(?!(?:with|who|whose|in|"
    r"on|of|for|after|came|has|had|is|was|from|and|to|at|by|under|presents|presenting|seen)\b|\w+ed\b)[a-z-]+)\b){0,3}"
)


@dataclass(frozen=True)
class Part:
    """What one sentence of a summary is written from."""

    text: str  # the line that says who the patient is, if the note says so, then the note's words
    quoted: str  # the note's words alone, which stand where the specialist's are refused
    note_sentences: tuple[int, ...]  # 1-based


def patient_line(note: str) -> str:
    """Who the patient is as the note has it, "Patient: 44-year-old teacher."; "" if it names no patient."""
    text = next((unit.text for unit in read_units(note) if unit.names_patient), "")
    named = _WHO.search(text)
    who = named[0] if named else " ".join(re.split(r"[,;:.](?=\s|$)", text, maxsplit=1)[0].split()[:8])
    return f"Patient: {who}." if who else ""


def make_parts(note: str, quoted: Sequence[Quoted]) -> list[Part]:
    """One part for each quoted sentence, with those that refer back to it or to which it refers."""
    line = patient_line(note)
    units = read_units(note)
    groups: list[list[Quoted]] = []
    for one in quoted:
        if groups and units[one.note_sentences[-1] - 1].needs in groups[-1][-1].note_sentences:
            groups[-1].append(one)
        else:
            groups.append([one])
    return [
        _part(line, " ".join(one.text for one in group), {n for one in group for n in one.note_sentences})
        for group in groups
    ]


def _part(line: str, quoted: str, numbers: Iterable[int]) -> Part:
    is_named = not line or line[9:-1] in quoted
    return Part(quoted if is_named else f"{line}\n{quoted}", quoted, tuple(sorted(numbers)))


def training_pairs(note: str, summary: str) -> tuple[list[tuple[Part, str]], Counter]:
    """Pairs of a part and the summary sentence that it covers; what was trimmed or left out, by reason."""
    units = {unit.number: unit for unit in read_units(note) if unit.kind == "sentence"}
    words = {number: _stems(f"{unit.label} {unit.text}") for number, unit in units.items()}
    line = patient_line(note)
    pairs, reasons = [], Counter()
    for piece in (
        piece for sentence in split_sentences(strip_citations(summary)) for piece in _pieces(sentence)
    ):
        kept, numbers = _keep(piece, words, _stems(line))
        if not kept:
            reasons["left out: the note's sentences do not hold it"] += 1
            continue
        reasons["trimmed"] += kept != piece
        texts = [(shown_label(units[number].label), units[number].text.rstrip(" ,;:.")) for number in numbers]
        labeled = [
            f"{label}: {text}." if label else f"{text[:1].upper()}{text[1:]}." for label, text in texts
        ]
        pairs.append((_part(line, " ".join(labeled), numbers), kept))
    return pairs, +reasons


def _stems(text: str) -> set[str]:
    words = TOKEN.findall(spell_out(text).lower())
    return {
        word if word[0].isdigit() else stem(word) for word in words if word[0].isdigit() or is_telling(word)
    }


def _pieces(sentence: str) -> list[str]:
    """A sentence cut where its pieces are sentences too."""
    first, *others = _CUT.split(sentence.strip())
    pieces = [first]
    for cut, piece in zip(others[::2], others[1::2], strict=True):
        if _VERB.search(pieces[-1]) and _VERB.search(piece):
            pieces.append(piece)
        else:
            pieces[-1] += cut + piece
    return [piece[0].upper() + piece[1:].rstrip(" .,;") + "." for piece in pieces if piece]


def _keep(piece: str, words: dict[int, set[str]], known: set[str]) -> tuple[str, list[int]]:
    """The piece, or as much of its beginning as note sentences hold, and these; ("", []) if they do not."""
    ends = [match.start() for match in _TAIL.finditer(piece)]
    for end in [len(piece), *reversed(ends[-12:])]:
        text = piece[:end].rstrip(" .,;") + "."
        wanted = _stems(text) - known
        numbers, left = cover(wanted, words)
        is_held = len(left) <= (1 - _COVERED) * len(wanted) and not any(word[0].isdigit() for word in left)
        if numbers and is_held and (end == len(piece) or (_VERB.search(text[:-4]) and len(text.split()) > 4)):
            return text, numbers
    return "", []


def learn_shorthand(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The words that summaries use for a note's short forms, counted in (note, summary) rows.

    A short form is the first letters of two or three words (BP, blood pressure) or begins a word (creat,
    creatinine). It counts in two rows at least, and in half of those where the note has it and the summary
    does not."""
    seen, found = Counter(), Counter()
    for note, summary in rows:
        written = re.findall(r"[a-z]+", summary.lower())
        known = set(re.findall(r"[a-z]+", note.lower()))
        lacking = {word for word in known if 2 <= len(word) <= 5}.difference(written)
        seen.update(lacking)
        forms = {pair for i in range(len(written)) for pair in _short_forms(written, i, known)}
        found.update((short, long) for short, long in forms if short in lacking)
    table = {}
    for (short, long), n in sorted(found.items()):
        if n > 1 and n >= seen[short] / 2:
            table.setdefault(short, []).append(long)
    return table


def _short_forms(words: list[str], i: int, known: set[str]) -> Iterator[tuple[str, str]]:
    """(short form, what it stands for) for the words that begin at i and that the note lacks."""
    for size in (2, 3):
        phrase = words[i : i + size]
        if len(phrase) == size and not known.issuperset(phrase):
            yield "".join(word[0] for word in phrase), " ".join(phrase)
    # "Stopped" is not what "stop" is short for
    if words[i] not in known and not re.search("(?:ed|ing|al|ion|s)$", words[i]):
        yield from ((words[i][:size], words[i]) for size in range(2, 6) if len(words[i]) > size + 2)
