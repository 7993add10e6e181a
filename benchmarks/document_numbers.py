"""Measures the figures that README.md and the guide show, and writes them there.

    python benchmarks/document_numbers.py                          # what docs/numbers.json lacks
    python benchmarks/document_numbers.py --only losses presets    # these again

Each section is written as soon as it is measured, so the command continues where it was stopped. `presets` is
a section for each data set and preset (presets/mts/quick), with MTS-Dialog if it is in ../shared/data. Runs
stay in models/numbers. A figure's place in a document is between <!-- numbers: NAME --> and <!-- end -->."""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import cpu_name
from sft.cli import log
from sft.files import ROOT, write_atomic
from sft.training.recipes import PRESETS

NUMBERS = ROOT / "docs" / "numbers.json"
DOCUMENTS = [ROOT / "README.md", ROOT / "STAGE_A_SFT_GUIDE.md"]
RUNS = ROOT / "models" / "numbers"
DEFAULT_RUN = RUNS / "default"
MTS_DIALOG = ROOT.parent / "shared" / "data" / "mts_dialog"
N_MTS_ROWS = 200
N_MTS_TEST_NOTES = 42  # as many as phase1_data has
VERSIONS = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft")]
MACHINE = f"{cpu_name()}, {os.cpu_count()} cores, {', '.join(VERSIONS)}"
FIGURES = "clean rewritten check_score coverage own_share rougeL loss copied".split()


def run(*arguments) -> tuple[str, float]:
    """(what a script printed on both streams, minutes)"""
    started = time.monotonic()
    log(f"$ python {' '.join(map(str, arguments))}")
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(f"{result.stdout}exit status {result.returncode}")
    return result.stdout, (time.monotonic() - started) / 60


def train(folder: Path, *options) -> dict:
    """A run's losses, speed and memory."""
    _, minutes = run("stage_a_sft_training.py", "--output_dir", folder, "--overwrite", *options)
    stats = json.loads((folder / "training_stats.json").read_text())
    return {
        "untrained_val_loss": stats["untrained_val_loss"],
        "val_losses": [epoch["val_loss"] for epoch in stats["epochs"]],
        "kept_val_loss": stats["epochs"][stats["kept_epoch"] - 1]["val_loss"],
        "tokens_per_second": [epoch["tokens_per_second"] for epoch in stats["epochs"]],
        "peak_memory_mb": max(epoch["peak_memory_mb"] for epoch in stats["epochs"]),
        "minutes": minutes,
    }


def evaluate(folder: Path, *options) -> dict:
    """The figures of each system on held-out notes."""
    output = folder.with_name(f"{folder.name}_evaluation")
    shutil.rmtree(output, ignore_errors=True)
    model = ("--model_path", folder / "final_model", "--output_dir", output)
    _, minutes = run("sft_evaluation.py", *model, *options)
    found = json.loads((output / "evaluation.json").read_text())
    systems = {
        system: {name: values[name]["value"] for name in FIGURES if name in values}
        for system, values in found["figures"].items()
    }
    return {"n_notes": found["n_notes"], "minutes": minutes, "systems": systems}


def estimated_time(options) -> str:
    """Of a whole run, by --dry_run, such as "4 min"."""
    printed, _ = run("stage_a_sft_training.py", "--dry_run", *options)
    return re.search(r"whole run will take about (.*?):", printed)[1]


def measure_preset(rows: str, preset: str) -> dict:
    """One preset, trained on one data set and evaluated on its test notes."""
    folder = RUNS / f"{rows}_{preset}"
    training = validation = test = []
    if rows == "mts":
        all_rows = pd.read_csv(MTS_DIALOG / "train.csv", dtype=str, keep_default_na=False)
        RUNS.mkdir(parents=True, exist_ok=True)
        all_rows.sample(min(N_MTS_ROWS, len(all_rows)), random_state=42).to_csv(RUNS / "mts.csv", index=False)
        training = ["--train_csv", RUNS / "mts.csv"]
        validation = ["--val_csv", MTS_DIALOG / "validation.csv"]
        test = ["--test_csv", MTS_DIALOG / "test.csv", "--n_rows", N_MTS_TEST_NOTES]
    options = ["--preset", preset, *training, *validation]
    trained = train(folder, *options) | {"estimate": estimated_time(options)}
    systems = ["--systems", "free", "verified", "quote", "reference"]
    return trained | {"evaluation": evaluate(folder, *training, *test, *systems)}


def sections() -> dict:
    """What measures each section. The documents' recipe on phase1_data is the default run."""
    data_sets = ["phase1", "mts"] if MTS_DIALOG.is_dir() else ["phase1"]
    names = [(rows, preset) for rows in data_sets for preset in PRESETS][1:]
    presets = {f"presets/{rows}/{preset}": partial(measure_preset, rows, preset) for rows, preset in names}
    first = {"losses": lambda: train(DEFAULT_RUN), "evaluation": lambda: evaluate(DEFAULT_RUN)}
    return first | presets


def percent(share: float | None) -> str:
    return "" if share is None else str(int(100 * share + 0.5))


def hundredths(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".removeprefix("0")


def gigabytes(mebibytes: float) -> str:
    return f"{mebibytes * 2**20 / 1e9:.1f} GB"


def table(rows: list[list[str]]) -> list[str]:
    """Markdown, the first row as heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|---|{'--:|' * (len(rows[0]) - 1)}", *lines[1:]]


def losses_table(numbers: dict) -> list[str]:
    found = numbers["losses"]
    losses = ", ".join(f"{loss:.4f}" for loss in [found["untrained_val_loss"], *found["val_losses"]])
    speeds = ", ".join(f"{speed:.0f}" for speed in found["tokens_per_second"])
    heading = ["", "minutes", "Val Loss: untrained, after each epoch", "tokens/s", "peak memory"]
    row = ["the default run", f"{found['minutes']:.1f}", losses, speeds, gigabytes(found["peak_memory_mb"])]
    return table([heading, row])


SYSTEMS = {"base": "base", "base_examples": "base, 2 examples", "free": "free", "verified": "verified"}
SYSTEMS |= {"quote": "quoted", "lead": "first and last sentences", "reference": "reference"}
MEASURES = {
    "summaries without a finding of the check, %": ("clean", percent),
    "findings per 100 rewritten sentences": ("rewritten", percent),
    "facts of the reference held, %": ("coverage", percent),
    "ROUGE-L": ("rougeL", hundredths),
    "loss per token, nats": ("loss", hundredths),
    "copied words, %": ("copied", percent),
}


def evaluation_table(numbers: dict) -> list[str]:
    figures = [numbers["evaluation"]["systems"][system] for system in SYSTEMS]
    rows = [["", *SYSTEMS.values()]]
    for label, (name, shown) in MEASURES.items():
        rows.append([label, *(shown(values.get(name)) for values in figures)])
    return table(rows)


def presets_table(numbers: dict) -> list[str]:
    losses = "Val Loss untrained; trained"
    scores = "verified: own sentences, %; free: facts held, %; free: check score; free: ROUGE-L"
    rows = [["rows, preset", *f"{losses}; {scores}; time; peak memory".split("; ")]]
    default = numbers["losses"] | {"evaluation": numbers["evaluation"]}
    for section, found in [("presets/phase1/documents", default), *numbers.items()]:
        if not section.startswith("presets/"):
            continue
        free = found["evaluation"]["systems"]["free"]
        own_share = found["evaluation"]["systems"].get("verified", {}).get("own_share")
        row = [
            section.removeprefix("presets/").replace("/", ", "),
            f"{found['untrained_val_loss']:.4f}",
            f"{found['kept_val_loss']:.4f}",
            "" if own_share is None else f"{100 * own_share:.1f}",
            percent(free.get("coverage")),
            hundredths(free.get("check_score")),
            hundredths(free.get("rougeL")),
            found.get("estimate") or f"{found['minutes']:.0f} min",
            gigabytes(found["peak_memory_mb"]),
        ]
        rows.append(row)
    return table(rows)


PEERS = {
    "this toolkit": "toolkit",
    "TRL 1.16 SFTTrainer, its default": "trl",
    "TRL, the fastest of three other settings": "",
    "Hugging Face Trainer": "hugging_face",
}
SHAPES = {
    "short rows (60 to 120 tokens)": "short, q_proj v_proj",
    "MTS-Dialog rows (up to 512 tokens)": "mts, q_proj v_proj",
}


def throughput_table(_) -> list[str]:
    """Medians of what training_throughput.py left."""
    found = json.loads((ROOT / "docs" / "training_throughput.json").read_text(encoding="utf-8"))
    rows = [["", *(heading for shape in SHAPES for heading in (f"{shape}: rows/s", "peak memory"))]]
    for label, peer in PEERS.items():
        rows.append([label])
        for section in map(found.get, SHAPES.values()):
            runs = section["runs"][peer or section["best_of_trl"]]
            speed = section["counts"]["n_rows"] / statistics.median(run["seconds"] for run in runs)
            memory = statistics.median(run["peak_memory_mb"] for run in runs)
            rows[-1] += [f"{speed:.2f}", gigabytes(memory)]
    return table(rows)


# What is shown at a place, and the section that it needs
PLACES = {
    "losses": (losses_table, "losses"),
    "evaluation": (evaluation_table, "evaluation"),
    "presets": (presets_table, "evaluation"),
    "throughput": (throughput_table, ""),
}


def with_numbers(text: str, numbers: dict) -> str:
    """A document with the figures in their places; what was not measured stays as it is."""

    def fill(place: re.Match) -> str:
        lines, section = PLACES[place[2]]
        is_measured = not section or section in numbers
        return place[1] + "\n".join(lines(numbers)) + place[4] if is_measured else place[0]

    # Marks of the tests may stand between a place and its block
    pattern = r"(<!-- numbers: (\w+) -->\n(?:<!-- .*? -->\n)*\n?)(.*?)(\n<!-- end -->)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="SECTION", help=", ".join(sections()))
    only = parser.parse_args().only
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    for name, measure in sections().items():
        if any(f"{name}/".startswith(f"{wanted}/") for wanted in only) if only else name not in numbers:
            numbers[name] = {"date": date.today().isoformat(), "machine": MACHINE, **measure()}
            write_atomic(NUMBERS, json.dumps(numbers, indent=1) + "\n", 0o644)
    for file in DOCUMENTS:
        write_atomic(file, with_numbers(file.read_text(encoding="utf-8"), numbers), 0o644)


if __name__ == "__main__":
    main()
