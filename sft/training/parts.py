"""What training learns of writing by sentences: which of a note's sentences its summaries use (the selector),
what they write for its short forms, and single sentences to train on. Needs no torch."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sft.cli import log, on_main_process, plural
from sft.data.rows import Row
from sft.grounding.citations import strip_citations
from sft.grounding.parts import learn_shorthand, training_pairs
from sft.grounding.selector import ENOUGH_KIN, fit_selector
from sft.options import TrainConfig

_FEWEST_NOTES = 20  # of which a selector is fitted that decides by default
_MOST_FITTED = 500  # rows; a few dozen fit as good a selector
_MOST_ROWS = 2000  # that parts are made of: more would take minutes at each start


@dataclass(frozen=True)
class Learned:
    """`settings`: what sft_config.json keeps of it; `rows`: parts of notes with a sentence for each;
    `counts`: of these rows, for sft_config.json."""

    settings: dict
    rows: list[Row]
    counts: dict

    @property
    def digest(self) -> str:
        """Equal for equal rows; "" for none."""
        texts = json.dumps([(row.clinical_note, row.model_summary) for row in self.rows])
        return hashlib.sha256(texts.encode()).hexdigest() if self.rows else ""


def learn_writing(rows: Sequence[Row], config: TrainConfig, is_numbered: bool) -> Learned:
    """Fits the selector on the training rows and makes the rows of parts, if the run has them. `is_numbered`:
    whether the prompt numbers the note's sentences. Says what came of it, in figures."""
    rows = _every(rows, _MOST_ROWS)
    pairs = [(row.clinical_note, strip_citations(row.model_summary)) for row in rows]
    selector = fit_selector(_every(pairs, _MOST_FITTED))
    n_notes = len({row.note_key for row in rows})
    writing = "quote" if selector.supported and n_notes >= _FEWEST_NOTES else "free"
    figure = f"kinship {selector.kinship:.2f}, needs {ENOUGH_KIN}; {plural(n_notes, 'note')}, needs {_FEWEST_NOTES}"
    messages = [f"Writing: {writing} by default (of summaries to their notes' sentences: {figure})"]
    if writing == "free":
        messages.append(
            "free writing may invent: read every summary beside its note, or give --writing quote"
        )
    part_rows, left_out = [], Counter()
    # A part's sentence has no citations, which the instruction asks for
    if config.part_rows and is_numbered:
        messages.append("Parts: none: the summaries cite numbered sentences")
    elif config.part_rows:
        for row, pair in zip(rows, pairs, strict=True):
            sentences, reasons = training_pairs(*pair)
            left_out += reasons
            for part, text in sentences:
                part_rows.append(dataclasses.replace(row, clinical_note=part.text, model_summary=text))
        reasons = [f"{n:,} {reason}" for reason, n in left_out.most_common()]
        messages.append(
            f"Parts: {plural(len(part_rows), 'sentence')} of {plural(len(rows), 'row')}; {', '.join(reasons)}"
        )
    if on_main_process():
        for message in messages:
            log(message.rstrip("; "))
    shorthand = learn_shorthand(pairs)
    settings = {"writing": writing, "selector": json.loads(selector.to_json()), "shorthand": shorthand}
    counts = {"used": len(part_rows), "of_rows": len(rows), "left_out": dict(left_out)}
    return Learned(settings, part_rows, counts)


def _every(items: Sequence, most: int) -> Sequence:
    """Every n-th of them, at most `most`."""
    return items[:: -(-len(items) // most) or 1]
