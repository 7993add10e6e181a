"""How often are sentence boundaries of real notes wrong?

    python benchmarks/sentence_boundaries.py FOLDER [--half develop|held_out] [--peers]

FOLDER holds aci_bench/ and mts_dialog/ (CC BY 4.0). Two measures, both as errors (boundaries missed or made
up) per 100 boundaries:

- wrapped: each text with its lines wrapped at 60, 65, 72, 76 and 80 columns must have the sentences of the
  text as it is. No labels are needed.
- labeled: against boundaries marked by hand (data/sentence_boundaries.json: text's id -> offsets of sentence
  ends, counted in characters that are not white space).

The rules were written while looking at MTS-Dialog's sections and every other note of ACI-BENCH ("develop").
Held out: the other notes of ACI-BENCH, MTS-Dialog's dialogues, and the notes of phase1_data. All labels are
of held-out texts. They were marked by reading version 2's sentences and correcting them, which favors
version 2. --peers measures pysbd and sentencex too (they must be installed), all on the labeled texts, since
pysbd is slow."""

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
MTS_FILES = ("mts_dialog/test", "mts_dialog/validation", "mts_dialog/train")
OWN_FILES = ("test_set_processed", "validation_set_processed", "train_set_processed")


def read_texts(folder: Path, half: str) -> dict[str, str]:
    """The texts of one half, as id -> text."""
    aci = [row["clinical_note"] for row in _rows(folder / "aci_bench/notes.csv")]
    texts = {f"aci-{i}": text for i, text in enumerate(aci) if i % 2 == (half == "held_out")}
    column = "clinical_note" if half == "held_out" else "model_summary"
    for name in MTS_FILES:
        texts |= {row["id"]: row[column] for row in _rows(folder / f"{name}.csv")}
    if half == "held_out":
        own = Path(__file__).parent.parent / "phase1_data" / "sft"
        for name in OWN_FILES:
            texts |= {
                row["id"]: row[column] for row in _rows(own / f"{name}.csv") if row["label"] == "factual"
            }
    return {text_id: text for text_id, text in texts.items() if text.strip()}


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
    labels = json.loads(LABELS.read_text()) if arguments.half == "held_out" else {}
    texts = read_texts(arguments.folder, arguments.half)
    if arguments.peers:
        texts = {text_id: text for text_id, text in texts.items() if text_id in labels}
    print(f"{arguments.half}: {len(texts)} texts")
    report("version 1", texts, labels, lambda text: sentence_spans(text, 1))
    report("version 2", texts, labels, lambda text: sentence_spans(text, 2))
    for name, split in peers() if arguments.peers else ():
        report(name, texts, labels, split)


if __name__ == "__main__":
    main()
