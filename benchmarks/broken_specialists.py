"""Does the evaluation tell a broken specialist from a good one?

    python benchmarks/broken_specialists.py FOLDER [--n_rows 20] [options of training]

Trains four specialists: a good one; one on summaries shuffled over the notes; one at ten times the learning
rate; one on hallucinated summaries, relabeled factual. Each writes freely on the same test notes. Prints the
figures of sft_evaluation.py, and the difference of each broken one from the good one, a mean over notes with
its 95 % interval. About 25 minutes on 2 quiet cores; what is there already in FOLDER is not made again."""

import argparse
import csv
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.rows import Row, factual_rows, read_rows
from sft.evaluation.figures import mean_over_notes, shown
from sft.evaluation.measures import MEASURES
from sft.files import ROOT, make_private_dir, write_atomic
from sft.inference.results import csv_row
from sft.options import BUNDLED_TRAIN_FILE, BUNDLED_VALIDATION_FILE, TrainConfig

SHOWN = ("loss", "check_score", "flagged", "invented", "coverage", "model_support", "rouge1", "repeats")
COLUMNS = ("id", "clinical_note", "model_summary", "label")


def run(script: str, *arguments) -> None:
    subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True)


def shuffled(rows: Sequence[Row]) -> list[Row]:
    """Each note with another one's summary."""
    mixed = random.Random(0).sample(rows, len(rows))
    summaries = {row.number: after.model_summary for row, after in zip(mixed, [*mixed[1:], mixed[0]])}
    return [replace(row, model_summary=summaries[row.number]) for row in rows]


def relabeled(rows: Sequence[Row]) -> list[Row]:
    """A hallucinated summary as the factual one of each note that has any, else the factual one."""
    chosen = {row.note_key: row for row in sorted(rows, key=lambda row: row.label == "hallucinated")}
    return [replace(row, label="factual") for row in chosen.values()]


def train_all(folder: Path, train_csv: str, options: Sequence[str]) -> dict[str, Path]:
    """{kind: its final_model}, the good one first."""
    rows = read_rows(train_csv)
    for name, made in (("shuffled", shuffled(factual_rows(rows))), ("relabeled", relabeled(rows))):
        lines = (csv_row([getattr(row, column) for column in COLUMNS]) for row in made)
        write_atomic(folder / f"{name}.csv", csv_row(COLUMNS) + "".join(lines))
    runs = {
        "good": (train_csv, []),
        "shuffled": (folder / "shuffled.csv", []),
        "ten_times_the_rate": (train_csv, ["--learning_rate", 10 * TrainConfig.learning_rate]),
        "relabeled": (folder / "relabeled.csv", []),
    }
    for kind, (file, more) in runs.items():
        if not (folder / kind / "final_model").is_dir():
            more = [*options, *more, "--overwrite", "--output_dir", folder / kind]
            run("stage_a_sft_training.py", "--train_csv", file, *more)
    return {kind: folder / kind / "final_model" for kind in runs}


def differences(evaluation_csv: Path, system: str, other: str, measure: str) -> dict:
    """The mean over notes of what `system` has more than `other`, as of mean_over_notes."""
    with open(evaluation_csv, encoding="utf-8", newline="") as file:
        cells = {(line["row"], line["system"]): line[measure] for line in csv.DictReader(file)}
    pairs = ((note, value, cells[note, other]) for (note, name), value in cells.items() if name == system)
    both = ((note, own, others) for note, own, others in pairs if own and others)
    return mean_over_notes((note, float(own) - float(others)) for note, own, others in both)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train_csv", default=BUNDLED_TRAIN_FILE)
    parser.add_argument("--val_csv", default=BUNDLED_VALIDATION_FILE)
    parser.add_argument("--test_csv", default="phase1_data/sft/test_set_processed.csv")
    parser.add_argument("--n_rows", help="test notes (default: all)")
    arguments, options = parser.parse_known_args()
    folder = make_private_dir(arguments.folder)
    models = train_all(folder, arguments.train_csv, ["--val_csv", arguments.val_csv, *options])
    evaluation = ["--test_csv", arguments.test_csv, "--systems", "base", "free", "reference"]
    evaluation += ["--output_dir", folder / "evaluation", "--model_path", *models.values()]
    run("sft_evaluation.py", *evaluation, *(["--n_rows", arguments.n_rows] if arguments.n_rows else []))
    found = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["figures"]
    names = {"base": "base"} | {kind: f"free_{place}" for place, kind in enumerate(models, 1)}
    for measure in SHOWN:
        print(f"\n{MEASURES[measure].title}")
        for kind, name in names.items():
            line = f"  {kind:<20} {interval(measure, found[name].get(measure))}"
            if kind not in ("base", "good"):
                more = differences(folder / "evaluation" / "evaluation.csv", name, names["good"], measure)
                is_apart = more["low"] is not None and more["low"] * more["high"] > 0
                line += f"   minus the good one's, by note: {interval(measure, more)}"
                line += ": told apart" if is_apart else ": no difference shown"
            print(line)


def interval(measure: str, figure: dict | None) -> str:
    value, low, high = (shown(MEASURES[measure], figure, part) for part in ("value", "low", "high"))
    return f"{value:>7} ({low} to {high})"


if __name__ == "__main__":
    main()
