"""Summaries by our own models, judged sentence by sentence: how well does the check's risk tell?

    python benchmarks/judged_set.py                       # the half for building
    python benchmarks/judged_set.py --half final          # for final figures only
    python benchmarks/judged_set.py --write again.jsonl --model smollm2-135m-instruct=smollm2-135m-instruct

Figures have 95 % intervals over notes. --write lets systems summarize the notes again (SYSTEM=FOLDER: an
adapter, or a base model as it is) and keeps the summaries that come out the same, for sets that store marks
without text. See phase1_data/judged."""

import argparse
import csv
import hashlib
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from check_quality import auroc, mean, show

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.grounding import PreparedNote
from sft.grounding.check import FLAG_THRESHOLD
from sft.grounding.words import content_stems

FOLDER = ROOT / "phase1_data" / "judged"
NOTES = [ROOT / f"phase1_data/sft/{split}_set_processed.csv" for split in ("train", "validation")]
MAX_NEW_TOKENS = 150
RISK_EDGES = [0, 0.5, 1, 2, 4, math.inf]


# ------------------------------------------------------------------------------- reading


def read_set(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_notes(paths: list[Path]) -> dict[str, tuple[Path, int, str]]:
    """(file, number of the row in it, note) by row id."""
    notes = {}
    for path in paths:
        with open(path, encoding="utf-8", newline="") as file:
            rows = enumerate(csv.DictReader(file))
            notes |= {row["id"]: (path, number, row["clinical_note"]) for number, row in rows}
    return notes


def half(note_id: str) -> str:
    """Half of the notes are for building, half for final figures."""
    return "final" if hashlib.sha256(note_id.encode()).digest()[0] % 2 else "build"


def fingerprint(record: dict) -> str:
    """The SHA-256 of a record's summary, which may not be stored itself."""
    return record.get("sha256") or hashlib.sha256(record["summary"].encode()).hexdigest()


# ------------------------------------------------------------------------------- writing again


def write_again(records: list[dict], notes: dict, models: dict[str, str], output: Path) -> None:
    """Lets every system of `models` write its summaries of the set, and keeps those that were read: the marks
    are not another text's."""
    groups = defaultdict(list)
    for record in records:
        path = notes[record["note"]][0]
        groups[record["system"], record["temperature"], record["seed"], path].append(record)
    n_written = n_kept = 0
    with open(output, "w", encoding="utf-8") as file:
        for (system, temperature, seed, _), group in sorted(groups.items(), key=str):
            if system not in models:
                continue
            numbered = {notes[record["note"]][1]: record for record in group}
            texts = {number: notes[record["note"]][2] for number, record in numbered.items()}
            for number, summary in summarize(models[system], texts, temperature, seed):
                n_written += 1
                if fingerprint({"summary": summary}) == fingerprint(numbered[number]):
                    n_kept += 1
                    record = numbered[number] | {"summary": summary}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{n_written} summaries written, {n_kept} of them the ones that were read: kept")


def summarize(model: str, texts: dict[int, str], temperature: float, seed: int) -> Iterator[tuple[int, str]]:
    """(number, summary) of each note, by an adapter or by a base model with the toolkit's prompt."""
    if not (Path(model) / "adapter_config.json").is_file():
        yield from summarize_untrained(model, texts, temperature, seed)
        return
    from sft_inference import SFTInference

    results = SFTInference(model).summarize(texts, MAX_NEW_TOKENS, temperature, batch_size=8, seed=seed)
    for number, result in results:
        yield number, result["generated_summary"]


def summarize_untrained(
    model: str, texts: dict[int, str], temperature: float, seed: int
) -> Iterator[tuple[int, str]]:
    """The same by a base model as it is, in the dtype of its file."""
    from sft.data.prompt import PromptEncoder, build_template
    from sft.data.text import clean_text
    from sft.inference.decoding import decode, enable_kv_cache
    from sft.model.base import load_base_model, load_tokenizer, pick_device, resolve_model
    from sft.model.kernels import PackedLinear, has_onednn, replace_linear_layers

    folder = resolve_model(model)
    tokenizer = load_tokenizer(folder)
    encoder = PromptEncoder(tokenizer, build_template(tokenizer))
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    placement = pick_device("auto", dtype)
    base = load_base_model(folder, placement.device, placement.dtype).eval()
    # As inference does with float32, so that both round alike
    if dtype == "float32" and placement.device.type == "cpu" and has_onednn():
        replace_linear_layers(base, PackedLinear)
    enable_kv_cache(base)
    stop_ids = encoder.template.stop_token_ids
    prompts = {
        number: encoder.prompt(encoder.encode_texts([clean_text(text)])[0]) for number, text in texts.items()
    }
    options = {"temperature": temperature, "batch_size": 8, "seed": seed}
    for sequence in decode(base, prompts, MAX_NEW_TOKENS, stop_ids, **options):
        yield sequence.index, tokenizer.decode(sequence.ids, skip_special_tokens=True).strip()


# ------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Sentence:
    """What the check and the reader say of a sentence; a copy is one with the note's own words."""

    risk: float
    n_missing: int  # content stems that the note lacks: the baseline
    is_wrong: bool
    is_copy: bool


@dataclass(frozen=True)
class Summary:
    """`marks`: (kind, the highest risk of the sentences it touches) of each statement marked as wrong."""

    risk: float
    n_missing: int
    is_wrong: bool
    sentences: list[Sentence]
    marks: list[tuple[str, float]]


def is_copy(sentence: str, note: str) -> bool:
    """Whether a sentence stands in the note, but for case, white space and the mark at its end."""
    return " ".join(sentence.lower().split()).rstrip(".!?…,;") in " ".join(note.lower().split())


def distinct_sentences(record: dict) -> list[tuple[int, int]]:
    """The spans of a summary's sentences, without those that say an earlier one or its beginning again: small
    models fall into loops, and one error said twenty times is one error."""
    spans = {}
    for start, end in record["sentences"]:
        words = " ".join(record["summary"][start:end].lower().split()).rstrip(".")
        words = re.sub(r"^(?:[\W\d]|[a-z]:\s)+", "", words)
        if not any(earlier.startswith(words) for earlier in spans):
            spans[words] = (start, end)
    return list(spans.values())


def measure(record: dict, note: str) -> Summary:
    """The check's risks of a summary beside what the reader marked."""
    text = record["summary"]
    check = PreparedNote(note).check(text)
    known = set(content_stems(note, numbers=False))
    spans = distinct_sentences(record)

    def risk_at(start: int, end: int) -> float:
        return max((one.risk for one in check.sentences if one.start < end and start < one.end), default=0.0)

    def n_missing(start: int, end: int) -> int:
        return sum(stem not in known for stem in content_stems(text[start:end], numbers=False))

    sentences = []
    marks = []
    for start, end in spans:
        wrong = [mark for mark in record["wrong"] if start <= mark["start"] < end]
        marks += [(mark["kind"], risk_at(mark["start"], mark["end"])) for mark in wrong]
        is_copied = is_copy(text[start:end], note)
        sentences.append(Sentence(risk_at(start, end), n_missing(start, end), bool(wrong), is_copied))
    return Summary(check.risk, n_missing(0, len(text)), bool(record["wrong"]), sentences, marks)


def ranking(notes: list[list[Summary]], value: str, which: str) -> float:
    """AUROC of `risk` or `n_missing` for a wrong statement: of summaries, sentences or rewritten ones."""
    items = [summary for summaries in notes for summary in summaries]
    if which != "summaries":
        items = [one for summary in items for one in summary.sentences]
    if which == "rewritten sentences":
        items = [one for one in items if not one.is_copy]
    values = [[getattr(one, value) for one in items if one.is_wrong is wrong] for wrong in (False, True)]
    return auroc(*values)


def share_flagged(notes: list[list[Summary]], threshold: float, kind: str | None = None) -> float:
    """The share of the marked statements, or of those of a kind, in a sentence at or above `threshold`."""
    marks = [mark for summaries in notes for summary in summaries for mark in summary.marks]
    return mean([[risk >= threshold for name, risk in marks if kind in (None, name)]])


def others(notes: list[list[Summary]], *, copies: bool = False) -> list[float]:
    """The risks of the rewritten sentences, or copies, without a wrong statement."""
    sentences = [one for summaries in notes for summary in summaries for one in summary.sentences]
    return [one.risk for one in sentences if one.is_copy is copies and not one.is_wrong]


def threshold_at(notes: list[list[Summary]], share: float) -> float:
    """The lowest threshold that flags at most `share` of the other rewritten sentences."""
    risks = sorted(others(notes), reverse=True)
    return float(np.nextafter(risks[int(share * len(risks))], np.inf))


def show_figures(notes: list[list[Summary]]) -> None:
    for which in ("sentences", "rewritten sentences", "summaries"):
        for value, name in (("risk", "risk"), ("n_missing", "missing words alone")):
            show(f"AUROC, {which}: {name}", notes, lambda n, w=which, v=value: ranking(n, v, w))
    for name, threshold in (("shipped", FLAG_THRESHOLD), ("for 15 %", threshold_at(notes, 0.15))):
        print(f"\nThreshold {threshold:.2f} ({name})")
        show("marked statements in a flagged sentence", notes, lambda n, t=threshold: share_flagged(n, t))
        for copies, title in ((False, "other rewritten sentences"), (True, "copied sentences")):
            flagged = lambda n, t=threshold, c=copies: mean([[r >= t for r in others(n, copies=c)]])  # noqa: E731
            show(f"{title} flagged", notes, flagged)
    kinds = Counter(kind for summaries in notes for summary in summaries for kind, _ in summary.marks)
    print("\nMarked statements in a flagged sentence, by kind (shipped threshold)")
    for kind, count in kinds.most_common():
        print(f"{kind:<14} {count:4}  {share_flagged(notes, FLAG_THRESHOLD, kind):.2f}")


def show_meaning(notes: list[list[Summary]]) -> None:
    """The chance that a summary states something wrong, by its risk, with Wilson's 95 % interval."""
    print("\nrisk            score        summaries  with a wrong statement")
    summaries = [summary for found in notes for summary in found]
    for low, high in itertools.pairwise(RISK_EDGES):
        wrong = [one.is_wrong for one in summaries if low <= one.risk < high]
        if not wrong:
            continue
        below, above = wilson(sum(wrong), len(wrong))
        scores = f"{math.exp(-high / 4):.2f} to {math.exp(-low / 4):.2f}"
        print(
            f"{low:4.2f} to {high:<6.2f} {scores:>14} {len(wrong):8}  "
            f"{sum(wrong) / len(wrong):.0%} [{below:.0%}, {above:.0%}]"
        )


def wilson(n_hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, JASA 22:209)."""
    z = 1.96
    middle = (n_hits + z * z / 2) / (n + z * z)
    width = z / (n + z * z) * math.sqrt(n_hits * (n - n_hits) / n + z * z / 4)
    return middle - width, middle + width


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", type=Path, default=FOLDER / "phase1.jsonl")
    parser.add_argument("--csv", type=Path, nargs="+", default=NOTES, help="the notes")
    parser.add_argument("--half", choices=["build", "final"], default="build")
    parser.add_argument("--write", type=Path, help="write the summaries again to this file")
    parser.add_argument("--model", nargs="+", default=[], metavar="SYSTEM=FOLDER", help="with --write")
    arguments = parser.parse_args()
    records = read_set(arguments.set)
    notes = read_notes(arguments.csv)
    if arguments.write:
        write_again(records, notes, dict(pair.split("=", 1) for pair in arguments.model), arguments.write)
        return
    per_note = defaultdict(list)
    for record in records:
        if half(record["note"]) == arguments.half:
            per_note[record["note"]].append(measure(record, notes[record["note"]][2]))
    summaries = [summary for found in per_note.values() for summary in found]
    sentences = [one for summary in summaries for one in summary.sentences]
    print(
        f"{arguments.half} half: {len(per_note)} notes, {len(summaries)} summaries ({sum(s.is_wrong for s in summaries)} "
        f"with a wrong statement), {len(sentences)} sentences ({sum(s.is_wrong for s in sentences)}), "
        f"{sum(not s.is_copy for s in sentences)} of them rewritten"
    )
    show_figures(list(per_note.values()))
    show_meaning(list(per_note.values()))


if __name__ == "__main__":
    main()
