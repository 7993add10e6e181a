"""How well does the check of summaries tell true from false? Figures with 95 % intervals over notes.

    python benchmarks/check_quality.py                                 # phase1's test file
    python benchmarks/check_quality.py --csv A.csv B.csv               # files with labels
    python benchmarks/check_quality.py --human mts_dialog/test.csv     # human-written, errors injected

Labels: the columns of phase1_data. For --human, every row counts as true, and one error of each of nine kinds
that fits is written into a copy of it; in one more copy, words of two sentences are exchanged. Rates are per
100 sentences."""

import argparse
import csv
import random
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft.grounding import PreparedNote
from sft.grounding.check import FLAG_THRESHOLD, TRAINING_THRESHOLD
from sft.grounding.sentences import sentence_spans, split_sentences
from sft.grounding.words import content_stems, is_telling, stem

KINDS = "number unit drug unsupported misplaced negation certainty side person time citation".split()
DRUGS = "metformin lisinopril amoxicillin omeprazole atorvastatin prednisone warfarin gabapentin sertraline".split()
FABRICATED = "with hematuria|with a new heart murmur|with jaundice|with papilledema|with a seizure last week|with melena"
KIN = {"father": "brother", "mother": "sister", "brother": "father", "sister": "mother", "wife": "daughter"}
KIN |= {
    "son": "nephew",
    "daughter": "aunt",
    "husband": "son",
    "grandmother": "sister",
    "grandfather": "cousin",
}
SIDES = {"left": "right", "right": "left"}
TIMES = {
    "before": "after",
    "after": "before",
    "days": "months",
    "weeks": "years",
    "months": "days",
    "years": "weeks",
}
TIMES |= {"today": "yesterday", "yesterday": "last month", "day": "month", "week": "year", "month": "week"}
UNITS = {
    "mg": "g",
    "mcg": "mg",
    "cm": "mm",
    "mm": "cm",
    "ml": "L",
    "kg": "lb",
    "pounds": "kg",
    "milligrams": "grams",
}
DROPPED = {
    "no": "",
    "not": "",
    "denies": "reports",
    "without": "with",
    "denied": "reported",
    "negative": "positive",
}


def swap(summary: str, words: dict[str, str], chance: random.Random) -> str | None:
    """The summary with one of its words replaced, None if it has none of them."""
    found = list(re.finditer(rf"\b({'|'.join(words)})\b", summary, re.IGNORECASE))
    if not found:
        return None
    match = chance.choice(found)
    return summary[: match.start()] + words[match.group().lower()] + summary[match.end() :]


def exchange(note: str, summary: str, chance: random.Random) -> str | None:
    """The summary with two words of different sentences exchanged, both of which the note has."""
    sentences = [summary[start:end] for start, end in sentence_spans(summary)]
    known = set(content_stems(note, numbers=False))
    words = [
        (number, word)
        for number, sentence in enumerate(sentences)
        for word in re.findall(r"(?<= )[a-z]{4,}(?=[ ,.])", sentence)
        if is_telling(word) and stem(word) in known
    ]
    couples = [(a, b) for a in words for b in words if a[0] < b[0] and stem(a[1]) != stem(b[1])]
    if not couples:
        return None
    (first, one), (second, other) = chance.choice(couples)
    sentences[first] = re.sub(rf"\b{one}\b", other, sentences[first], count=1)
    sentences[second] = re.sub(rf"\b{other}\b", one, sentences[second], count=1)
    return " ".join(sentences)


def inject(kind: str, note: str, summary: str, chance: random.Random) -> str | None:
    """The summary with one error of a kind, None if it holds nothing that could be wrong in this way."""
    if kind in ("side", "time", "person", "unit", "negation dropped"):
        words = {"side": SIDES, "time": TIMES, "person": KIN, "unit": UNITS}.get(kind, DROPPED)
        return swap(summary, words, chance)
    if kind == "number":
        found = list(re.finditer(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]\d|[.)] )", summary))
        if not found:
            return None
        match = chance.choice(found)
        value = float(match.group())
        wrong = (
            value * chance.choice([2, 3, 10])
            if "." in match.group()
            else value + chance.choice([1, 3, 7, 10])
        )
        return summary[: match.start()] + f"{wrong:g}" + summary[match.end() :]
    if kind == "drug":
        found = list(
            re.finditer(r"\b[A-Za-z]{4,}(?:ol|pril|statin|cillin|azole|ine|one|ide|tan|mycin)\b", summary)
        )
        drugs = [drug for drug in DRUGS if drug not in note.lower()]
        if not found:
            return None
        match = chance.choice(found)
        return summary[: match.start()] + chance.choice(drugs) + summary[match.end() :]
    if kind == "negation added":
        return swap(summary, {"has": "has no", "is": "is not", "was": "was not", "had": "had no"}, chance)
    if kind == "fused":
        return exchange(note, summary, chance)
    phrase = chance.choice(FABRICATED.split("|"))
    end = re.search(r"[.!?]?\s*$", summary).start()
    return f"{summary[:end]}, {phrase}{summary[end:]}"


INJECTED = [
    "fused",
    "number",
    "unit",
    "drug",
    "side",
    "time",
    "person",
    "negation added",
    "negation dropped",
    "fabricated",
]


def read(paths: list[str]) -> list[dict]:
    rows = []
    for path in paths:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


def auroc(low: list[float], high: list[float]) -> float:
    """The chance that one of `high` is above one of `low`, ties counting half."""
    first, second = np.sort(np.asarray(low)), np.asarray(high)
    if not len(first) or not len(second):
        return float("nan")
    below = np.searchsorted(first, second, "left") + np.searchsorted(first, second, "right")
    return float(below.mean() / 2 / len(first))


def show(name: str, per_note: list, figure, n_samples: int = 500) -> None:
    """Prints figure(per_note) with its interval, notes drawn again and again."""
    if not per_note:
        return
    chance = np.random.default_rng(0)
    draws = [chance.integers(0, len(per_note), len(per_note)) for _ in range(n_samples)]
    samples = [figure([per_note[i] for i in draw]) for draw in draws]
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    print(f"{name:<48} {figure(per_note):6.3f}  [{low:.3f}, {high:.3f}]  of {len(per_note)}")


def mean(items: list) -> float:
    """The mean over all values of all notes."""
    values = [value for item in items for value in item]
    return float(np.mean(values)) if values else float("nan")


def right(true: float, wrong: float) -> float:
    return float(wrong > true) + 0.5 * (wrong == true)


def changed_risks(check, summary: str, true_summary: str) -> list[float]:
    """The risks of the sentences of a summary that are not in the true one."""
    known = set(split_sentences(true_summary))
    return [
        one.risk for one in check.sentences if " ".join(summary[one.start : one.end].split()) not in known
    ]


def show_rates(checks: list) -> None:
    """Findings of each kind, and flagged sentences, per 100 sentences."""
    for kind in KINDS:
        counts = [(sum(f.kind == kind for f in check.findings), len(check.sentences)) for check in checks]
        show(
            f"{kind} findings per 100 sentences",
            counts,
            lambda c: 100 * sum(a for a, _ in c) / sum(b for _, b in c),
        )
    for name, threshold in (
        ("flagged", FLAG_THRESHOLD),
        ("flagged as training summaries", TRAINING_THRESHOLD),
    ):
        flags = [[one.risk >= threshold for one in check.sentences] for check in checks]
        show(f"true sentences {name}", flags, mean)


def show_pairs(pairs: dict[str, list]) -> None:
    """Of (risk of the true summary, risk of the wrong one, risks of its changed sentences) by kind."""
    for kind, found in pairs.items():
        show(f"pairs ranked right: {kind}", [[right(a, b)] for a, b, _ in found], mean)
    everything = [pair for found in pairs.values() for pair in found]
    show("pairs ranked right: all", [[right(a, b)] for a, b, _ in everything], mean)
    changed = [[risk >= FLAG_THRESHOLD for risk in risks] for _, _, risks in everything]
    show("changed sentences flagged", changed, mean)


def labeled(rows: list[dict]) -> None:
    true, wrong, checks = {}, defaultdict(list), []
    for row in rows:
        check = PreparedNote(row["clinical_note"]).check(row["model_summary"])
        if row["label"] == "factual":
            true[row["clinical_note"]] = (check, row["model_summary"])
            checks.append(check)
        else:
            wrong[row["clinical_note"]].append((check, row))
    show_rates(checks)
    pairs, notes, sentences = defaultdict(list), [], []
    for note, found in wrong.items():
        for check, row in found:
            if note in true:
                original, summary = true[note]
                risks = changed_risks(check, row["model_summary"], summary)
                pairs[row["hallucination_type"]].append((original.risk, check.risk, risks))
                notes.append((original.risk, check.risk))
                sentences.append(([one.risk for one in original.sentences], risks))
    show_pairs(pairs)
    show("AUROC, twins", notes, lambda n: auroc([a for a, _ in n], [b for _, b in n]))
    lists = lambda n, side: [risk for pair in n for risk in pair[side]]  # noqa: E731
    show("AUROC, true and changed sentences", sentences, lambda n: auroc(lists(n, 0), lists(n, 1)))


def human(rows: list[dict]) -> None:
    started = time.perf_counter()
    notes = [PreparedNote(row["clinical_note"]) for row in rows]
    checks = [note.check(row["model_summary"]) for note, row in zip(notes, rows)]
    seconds = time.perf_counter() - started
    print(f"{60 * len(rows) / seconds:,.0f} summaries a minute")
    show_rates(checks)
    chance = random.Random(0)
    pairs = defaultdict(list)
    for note, check, row in zip(notes, checks, rows):
        for kind in INJECTED:
            wrong = inject(kind, row["clinical_note"], row["model_summary"], chance)
            if wrong is not None:
                found = note.check(wrong)
                pairs[kind].append(
                    (check.risk, found.risk, changed_risks(found, wrong, row["model_summary"]))
                )
    show_pairs({kind: pairs[kind] for kind in INJECTED})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", nargs="+", default=[str(ROOT / "phase1_data/sft/test_set_processed.csv")])
    parser.add_argument("--human", nargs="+", help="files of human-written summaries; --csv is not read then")
    parser.add_argument("--first", type=int, help="only this many rows")
    parser.add_argument("--skip", type=int, default=0, help="leave out this many rows at the start")
    arguments = parser.parse_args()
    rows = read(arguments.human or arguments.csv)[arguments.skip :][: arguments.first]
    (human if arguments.human else labeled)(rows)


if __name__ == "__main__":
    main()
