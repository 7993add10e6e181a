"""What data of 2,000, 20,000 and 200,000 rows cost before the first update: time and memory, as a Markdown table.

    python benchmarks/data_scale.py [--rows 2000 20000 200000] [--model_name smollm2-135m-instruct]

Rows are invented from word lists, always the same: notes of 4 to 45 sentences, one row in ten hallucinated. Each start is a
process of its own, the first without a token cache, the second with it; the baseline is a process with the tokenizer alone.
"""

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

SUBJECTS = "The patient|He|She|The family|The nurse on duty|A relative".split("|")
VERBS = "reports|denies|describes|mentions|complains of|was seen for|improved after|recalls".split("|")
THINGS = "fever|chest pain|a dry cough|dizziness|swelling of the left ankle|nausea|a fall at home|poor sleep|palpitations|blurred vision".split(
    "|"
)
ENDS = "since Monday|for three days|after lunch|at night|on exertion|without relief|as before|despite treatment|over the last week".split(
    "|"
)
MEASURES = "Temperature {}.{} °C.|BP 1{}/7{} mmHg.|Heart rate 8{}, SpO2 9{} %.|CRP {}{} mg/l.|Potassium 4.{}, sodium 13{}.".split(
    "|"
)


def sentence(dice: random.Random) -> str:
    if dice.random() < 0.25:
        return dice.choice(MEASURES).format(dice.randrange(10), dice.randrange(10))
    return f"{dice.choice(SUBJECTS)} {dice.choice(VERBS)} {dice.choice(THINGS)} {dice.choice(ENDS)}."


def write_rows(path: Path, n: int, seed: int = 0) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "clinical_note", "model_summary", "label", "hallucination_type"])
        for i in range(n):
            dice = random.Random(f"{seed}-{i}")
            note = " ".join(sentence(dice) for _ in range(dice.randint(4, 45)))
            label = ("hallucinated", "wrong_number") if i % 10 == 9 else ("factual", "")
            writer.writerow(
                [f"r{seed}-{i}", note, " ".join(sentence(dice) for _ in range(dice.randint(1, 3))), *label]
            )


def start(folder: Path, model_name: str, measure: str) -> dict:
    """What a start of training does with its data, in this process: seconds of each part, and memory."""
    from sft.model.base import load_tokenizer

    tokenizer = load_tokenizer(model_name)
    memory = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
    if measure == "nothing":
        return {"memory": memory}
    from sft.data.dataset import epoch_order, load_datasets, packed_batch, warn_about_leaks, warn_about_rows
    from sft.data.rows import read_rows

    files, times = (folder / "train.csv", folder / "val.csv"), [time.perf_counter()]
    rows = read_rows(files[0]), read_rows(files[1])
    times.append(time.perf_counter())
    datasets = load_datasets(*files, tokenizer, rows=rows, cache_dir=folder / "token_cache")
    times.append(time.perf_counter())
    for part, path, dataset in zip(rows, files, datasets):
        warn_about_rows(path.name, part, dataset)
    warn_about_leaks(*rows)
    times.append(time.perf_counter())
    packed_batch([datasets[0].examples[i] for i in epoch_order(len(datasets[0]), 42, 0)[:8]])
    times.append(time.perf_counter())
    memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    n_tokens = sum(example.n_tokens for dataset in datasets for example in dataset.examples)
    return {"seconds": [b - a for a, b in itertools.pairwise(times)], "memory": memory, "n_tokens": n_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--model_name", default="smollm2-135m-instruct")
    parser.add_argument("--start", nargs=2, metavar=("FOLDER", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(Path(arguments.start[0]), arguments.model_name, arguments.start[1])))
        return

    def measured(folder: Path, what: str) -> dict:
        command = [
            sys.executable,
            __file__,
            "--model_name",
            arguments.model_name,
            "--start",
            str(folder),
            what,
        ]
        return json.loads(
            subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            ).stdout
        )

    with tempfile.TemporaryDirectory() as folder:
        print(f"Baseline, tokenizer loaded: {measured(Path(folder), 'nothing')['memory'][0]:,.0f} MB\n")
    print(
        "| rows | CSV, MB | tokens | start | read and check, s | tokenise or cache, s | warnings, s | first batch, s | peak memory, MB |"
    )
    print("|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    for n in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_rows(folder / "train.csv", n)
            write_rows(folder / "val.csv", max(1, n // 20), seed=1)
            size = sum(path.stat().st_size for path in folder.glob("*.csv")) / 1e6
            for what in ("first", "with cache"):
                result = measured(folder, what)
                seconds = " | ".join(f"{s:.2f}" for s in result["seconds"])
                print(
                    f"| {n:,} | {size:,.1f} | {result['n_tokens']:,} | {what} | {seconds} | {result['memory'][1]:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
