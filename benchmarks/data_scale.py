"""Time and memory that 2,000, 20,000 and 200,000 rows cost before the first step, as a Markdown table.

    python benchmarks/data_scale.py [--rows 2000 20000 200000] [--model_name smollm2-135m-instruct]

Rows are invented from word lists, always the same: notes of 4 to 45 sentences, one row in ten hallucinated.
Each start is a process of its own; the baseline is a process with the tokenizer alone. Before the table: the
search for near-copies alone."""

import argparse
import csv
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.rows import COLUMNS

SUBJECTS = "The patient|He|She|The family|The nurse on duty|A relative".split("|")
VERBS = "reports|denies|describes|mentions|complains of|was seen for|improved after|recalls".split("|")
THINGS = (
    "fever|chest pain|a dry cough|dizziness|swelling of the left ankle|nausea|a fall at home|poor sleep"
    "|palpitations|blurred vision"
).split("|")
ENDS = (
    "since Monday|for three days|after lunch|at night|on exertion|without relief|as before"
    "|despite treatment|over the last week"
).split("|")
MEASURES = (
    "Temperature {}.{} °C.|BP 1{}/7{} mmHg.|Heart rate 8{}, SpO2 9{} %.|CRP {}{} mg/l."
    "|Potassium 4.{}, sodium 13{}."
).split("|")


def sentence(dice: random.Random) -> str:
    if dice.random() < 0.25:
        return dice.choice(MEASURES).format(dice.randrange(10), dice.randrange(10))
    return f"{dice.choice(SUBJECTS)} {dice.choice(VERBS)} {dice.choice(THINGS)} {dice.choice(ENDS)}."


def sentences(dice: random.Random, fewest: int, most: int) -> str:
    return " ".join(sentence(dice) for _ in range(dice.randint(fewest, most)))


def write_rows(path: Path, n: int, seed: int = 0) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i in range(n):
            dice = random.Random(f"{seed}-{i}")
            label = ("hallucinated", "wrong_number") if i % 10 == 9 else ("factual", "")
            note = sentences(dice, 4, 45)
            summary = sentences(dice, 1, 3)
            writer.writerow([f"r{seed}-{i}", note, summary, *label])


def peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start(folder: Path, model_name: str) -> dict:
    """What a start of training does with its data, in this process: seconds of each part, and memory."""
    from sft.data.dataset import load_datasets, packed_batch, read_data
    from sft.data.report import log_data_warnings
    from sft.model.base import load_tokenizer
    from sft.options import DataOptions
    from sft.training.run import epoch_order

    tokenizer = load_tokenizer(model_name)
    options = DataOptions(train_csv=str(folder / "train.csv"), val_csv=str(folder / "val.csv"))
    times = [time.perf_counter()]
    rows = read_data(options)
    times.append(time.perf_counter())
    datasets = load_datasets(rows, tokenizer, options)
    times.append(time.perf_counter())
    log_data_warnings(rows, datasets, options)
    times.append(time.perf_counter())
    packed_batch([datasets[0].examples[i] for i in epoch_order(len(datasets[0]), 42, 0)[:8]])
    times.append(time.perf_counter())
    return {
        "seconds": [after - before for before, after in itertools.pairwise(times)],
        "memory": peak_memory_mb(),
        "n_tokens": sum(example.n_tokens for dataset in datasets for example in dataset.examples),
    }


def time_similar(n: int) -> float:
    """CPU seconds to compare n training notes and n / 20 validation notes, one in ten of them a near-copy."""
    from sft.data.similar import similar_notes

    dice = random.Random(n)
    notes = [f"Bed {i}. {sentences(dice, 4, 45)}" for i in range(n)]
    new = [sentences(dice, 4, 45) if i % 10 else f"Seen today. {notes[i]}" for i in range(max(1, n // 20))]
    start = time.process_time()
    similar_notes(notes + new, len(notes))
    return time.process_time() - start


def start_alone(model_name: str) -> dict:
    """The baseline: the tokenizer and the libraries."""
    from sft.model.base import load_tokenizer

    load_tokenizer(model_name)
    return {"memory": peak_memory_mb()}


def run_start(folder: str, model_name: str) -> dict:
    """`start`, or `start_alone` if there is no folder, in a process of its own."""
    command = [sys.executable, __file__, "--model_name", model_name, "--start", folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    parser.add_argument("--start", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model_name = arguments.model_name
    if arguments.start is not None:
        folder = arguments.start
        print(json.dumps(start(Path(folder), model_name) if folder else start_alone(model_name)))
        return

    for n in arguments.rows:
        print(f"Near-copies among {n:,} notes: {time_similar(n):.2f} s of CPU time")
    print(f"Baseline, tokenizer loaded: {run_start('', model_name)['memory']:,.0f} MB\n")
    columns = [
        "rows",
        "CSV, MB",
        "tokens",
        "read and check, s",
        "tokenize, s",
        "warnings, s",
        "first batch, s",
        "peak memory, MB",
    ]
    print(f"| {' | '.join(columns)} |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for n in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "train.csv", n)
            write_rows(Path(folder) / "val.csv", max(1, n // 20), seed=1)
            megabytes = sum(path.stat().st_size for path in Path(folder).glob("*.csv")) / 1e6
            result = run_start(folder, model_name)
            cells = [
                f"{n:,}",
                f"{megabytes:,.1f}",
                f"{result['n_tokens']:,}",
                *(f"{seconds:.2f}" for seconds in result["seconds"]),
                f"{result['memory']:,.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
