"""Parts of a note from which single sentences of a summary are written, and training pairs of that form."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sft.grounding.selector import Quoted
from sft.grounding.sentences import split_sentences
from sft.grounding.structure import content_stems, read_units

_COVERED = 0.65


@dataclass(frozen=True)
class Part:
    """What one sentence of a summary is written from."""

    text: str  # the line that says who the patient is, if the note says so, then the note's words
    source: str  # the same without that line: what a written sentence is traced to
    quoted: str  # the note's own words that stand where the specialist's are refused
    note_sentences: tuple[int, ...]  # 1-based


def patient_line(note: str) -> str:
    """The sentence that says who the patient is, cut to its opening words; "" if the note names no patient."""
    unit = next((unit for unit in read_units(note) if unit.names_patient), None)
    return f"Patient: {re.split(r'[,;.]', unit.text, maxsplit=1)[0]}." if unit else ""


def make_parts(note: str, quoted: Sequence[Quoted]) -> list[Part]:
    """One part for each quoted sentence, with what it needs."""
    line = patient_line(note)
    return [
        Part(f"{line}\n{one.text}" if line else one.text, one.text, one.text, one.note_sentences)
        for one in quoted
    ]


def training_pairs(note: str, summary: str) -> tuple[list[tuple[Part, str]], Counter]:
    """Pairs of a part and the summary sentence that its words cover; what was left out, by reason."""
    units = [unit for unit in read_units(note) if unit.kind == "sentence"]
    stems = {unit.number: set(content_stems(f"{unit.label} {unit.text}")) for unit in units}
    texts = {unit.number: unit.text for unit in units}
    line = patient_line(note)
    pairs, left_out = [], Counter()
    for sentence in split_sentences(summary):
        words = set(content_stems(sentence))
        left = set(words)
        numbers = []
        for _ in range(3):
            best = max(stems, key=lambda number: len(stems[number] & left), default=None)
            if best is None or not stems[best] & left:
                break
            numbers.append(best)
            left -= stems[best]
        if not words or len(left) > (1 - _COVERED) * len(words):
            left_out["not covered"] += 1
            continue
        source = " ".join(texts[number] for number in sorted(numbers))
        part = Part(f"{line}\n{source}" if line else source, source, source, tuple(sorted(numbers)))
        pairs.append((part, sentence))
    return pairs, left_out


def learn_shorthand(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The words that summaries use for a note's short forms, counted in (note, summary) rows."""
    return {}
