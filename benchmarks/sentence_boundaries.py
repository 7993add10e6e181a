"""How often are sentence boundaries of real notes wrong?

    python benchmarks/sentence_boundaries.py FOLDER [--half develop|held_out] [--peers]

FOLDER holds aci_bench/ and mts_dialog/ (CC BY 4.0). Two measures, both as errors (boundaries missed or made
up) per 100 boundaries:

- wrapped: each text with its lines wrapped at 60, 65, 72, 76 and 80 columns must have the sentences of the
  text as it is. No labels are needed.
- labeled: against boundaries marked by hand (data/sentence_boundaries.json: text's id -> offsets of sentence
  ends, counted in characters that are not white space).

The rules were written with the texts of even number; those of odd number are held out. --peers also measures
pysbd and sentencex, which must be installed.
"""

import argparse
import csv
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.grounding.sentences import sentence_spans

LABELS = Path(__file__).parent / "data" / "sentence_boundaries.json"
WIDTHS = (60, 65, 72, 76, 80)
FILES = ("aci_bench/notes", "mts_dialog/test", "mts_dialog/validation", "mts_dialog/train")


def read_texts(folder: Path) -> dict[str, str]:
    """Notes, dialogues and sections, as id -> text."""
    texts = {}
    csv.field_size_limit(10**9)
    for name in FILES:
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for column in ("clinical_note", "model_summary"):
                    text = (row.get(column) or "").replace("\r\n", "\n")
                    if text.strip():
                        texts[f"{row['id']}/{column}"] = text
    return texts


def wrap(text: str, width: int) -> str:
    wrapper = textwrap.TextWrapper(
        width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True
    )
    return "\n".join(line if len(line) <= width else wrapper.fill(line) for line in text.split("\n"))


def inner_ends(text: str, spans: list[tuple[int, int]]) -> set[int]:
    """Where sentences end, except the last, counted in characters that are not white space."""
    ends = set()
    n_visible = 0
    position = 0
    for _, end in spans[:-1]:
        n_visible += len("".join(text[position:end].split()))
        position = end
        ends.add(n_visible)
    return ends


def peers() -> Iterator[tuple[str, Callable]]:
    import pysbd
    import sentencex

    segmenter = pysbd.Segmenter(language="en", clean=False, char_span=True)
    yield "pysbd", lambda text: [(span.start, span.end) for span in segmenter.segment(text)]
    yield (
        "sentencex",
        lambda text: [
            (b["start_index"], b["end_index"]) if isinstance(b, dict) else (b.start_index, b.end_index)
            for b in sentencex.get_sentence_boundaries("en", text)
        ],
    )


def report(name: str, texts: dict[str, str], labels: dict[str, list[int]], split: Callable) -> None:
    n_boundaries = n_errors = 0
    for text in texts.values():
        expected = inner_ends(text, split(text))
        for width in WIDTHS:
            wrapped = wrap(text, width)
            n_errors += len(expected ^ inner_ends(wrapped, split(wrapped)))
            n_boundaries += len(expected)
    line = f"{name:<12} wrapped: {100 * n_errors / n_boundaries:6.2f} ({n_errors} in {n_boundaries:,})"
    missed = added = n_labeled = 0
    for text_id in labels.keys() & texts.keys():
        found = inner_ends(texts[text_id], split(texts[text_id]))
        expected = set(labels[text_id])
        missed += len(expected - found)
        added += len(found - expected)
        n_labeled += len(expected)
    if n_labeled:
        rate = 100 * (missed + added) / n_labeled
        line += f"   labeled: {rate:6.2f} ({missed} missed, {added} made up, {n_labeled} labeled)"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", choices=["develop", "held_out"], default="held_out")
    parser.add_argument("--peers", action="store_true")
    arguments = parser.parse_args()
    labels = json.loads(LABELS.read_text()) if LABELS.is_file() else {}
    every = list(read_texts(arguments.folder).items())
    texts = dict(every[arguments.half == "held_out" :: 2])
    print(f"{arguments.half}: {len(texts)} texts")
    report("version 1", texts, labels, lambda text: sentence_spans(text, 1))
    report("version 2", texts, labels, lambda text: sentence_spans(text, 2))
    for name, split in peers() if arguments.peers else ():
        report(name, texts, labels, split)


if __name__ == "__main__":
    main()
