"""How near quoted note sentences come to written summaries: ROUGE-L, rare words, length, time.

    python benchmarks/quoted_summaries.py --fit phase1_data/sft/train_set_processed.csv \\
        --csv phase1_data/sft/validation_set_processed.csv

Numbers choose between variants; whether a summary is fit to use is for a reader (--output writes them).
"""

import argparse
import csv
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sft.grounding.selector import fit_selector, not_mentioned, quote
from sft.grounding.structure import content_stems


def read(path: Path) -> list[dict]:
    csv.field_size_limit(10**9)
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("label", "factual") == "factual"]


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, as rouge-score counts without stemming."""
    a, b = (re.findall(r"[a-z0-9]+", part.lower()) for part in (text, reference))
    best = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, best[j] = best[j], diagonal + 1 if word == other else max(best[j], best[j - 1])
    return 2 * best[-1] / max(len(a) + len(b), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fit", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="JSON lines: id, note, summary, sentences, not_mentioned")
    args = parser.parse_args()
    train, rows = read(args.fit), read(args.csv)
    started = time.perf_counter()
    selector = fit_selector((row["clinical_note"], row["model_summary"]) for row in train)
    print(
        f"fit on {selector.n_pairs} pairs: {time.perf_counter() - started:.2f} s, {len(selector.to_json())} bytes"
    )
    print(f"kinship {selector.kinship}, supported: {selector.supported}")
    notes = Counter(stem for row in train for stem in set(content_stems(row["clinical_note"])))
    weight = {stem: math.log((len(train) + 1) / (count + 1)) for stem, count in notes.items()}
    scores, shares, lengths, lines, missing = [], [], [], [], Counter()
    started = time.perf_counter()
    quoted = [quote(row["clinical_note"], selector) for row in rows]
    print(f"quoted {len(rows)} notes in {time.perf_counter() - started:.2f} s")
    for row, sentences in zip(rows, quoted, strict=True):
        summary = " ".join(sentence.text for sentence in sentences)
        left_out = not_mentioned(row["clinical_note"], [sentence.text for sentence in sentences])
        missing.update(item.kind for item in left_out)
        lines.append({"id": row["id"], "note": row["clinical_note"], "summary": summary})
        lines[-1] |= {
            "sentences": [asdict(s) for s in sentences],
            "not_mentioned": [asdict(m) for m in left_out],
        }
        reference = row.get("model_summary")
        if reference:
            scores.append(rouge_l(summary, reference))
            wanted = {stem: weight.get(stem, math.log(len(train) + 1)) for stem in content_stems(reference)}
            said = sum(wanted[stem] for stem in wanted.keys() & set(content_stems(summary)))
            shares.append(said / max(sum(wanted.values()), 1e-9))
            lengths.append(len(summary.split()) / len(reference.split()))
    for name, values in [
        ("ROUGE-L", scores),
        ("reference's words, rare ones more", shares),
        ("length", lengths),
    ]:
        print(f"{name}: {sum(values) / max(len(values), 1):.3f}")
    print("not mentioned:", dict(missing))
    if args.output:
        args.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
