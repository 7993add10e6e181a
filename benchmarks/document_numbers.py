"""Measures the figures that README.md and the guide show, and writes them there.

    python benchmarks/document_numbers.py                          # what docs/numbers.json lacks
    python benchmarks/document_numbers.py --only losses presets    # these again

Each section is written as soon as it is measured, so the command continues where it was stopped. Runs and
evaluations stay in models/numbers; a section that is named with --only begins anew. `presets` is a section for
each preset and data set (presets/mts/quick); MTS-Dialog is read from ../shared/data and left out where that is
not there. docs/training_throughput.json is taken as training_throughput.py left it.

In the documents a figure's place is a table or a block between <!-- numbers: NAME --> and <!-- end -->;
tests/test_documents.py makes sure that it shows what is in docs/numbers.json."""

import argparse
import csv
import json
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.cli import log
from sft.data.rows import COLUMNS, factual_rows, read_rows
from sft.files import ROOT, write_atomic
from sft.training.recipes import PRESETS

NUMBERS = ROOT / "docs" / "numbers.json"
DOCUMENTS = [ROOT / "README.md", ROOT / "STAGE_A_SFT_GUIDE.md"]
RUNS = ROOT / "models" / "numbers"
MTS_DIALOG = ROOT.parent / "shared" / "data" / "mts_dialog"
N_MTS_ROWS = 200
N_TEST_NOTES = 42
FIGURES = "clean rewritten check_score coverage own_share rougeL loss copied".split()


# ------------------------------------------------------------------------------- measuring


def made() -> dict:
    """When, where and with what a section was measured."""
    import torch

    packages = ("torch", "transformers", "peft")
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def run(*arguments) -> tuple[str, float]:
    """(what a script printed on both streams, minutes)"""
    started = time.monotonic()
    command = [sys.executable, *map(str, arguments)]
    log(f"$ {' '.join(command[1:])}")
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(f"{result.stdout}exit status {result.returncode}")
    return result.stdout, (time.monotonic() - started) / 60


def train(folder: Path, *arguments) -> dict:
    """A run's losses, speed and memory."""
    printed, minutes = run("stage_a_sft_training.py", "--output_dir", folder, "--overwrite", *arguments)
    stats = json.loads((folder / "training_stats.json").read_text())
    epochs = stats["epochs"]
    return {
        "untrained_val_loss": stats["untrained_val_loss"],
        "val_loss": [epoch["val_loss"] for epoch in epochs],
        "best_val_loss": epochs[stats["kept_epoch"] - 1]["val_loss"],
        "tokens_per_second": [epoch["tokens_per_second"] for epoch in epochs],
        "peak_memory_mb": max(epoch["peak_memory_mb"] for epoch in epochs),
        "minutes": minutes,
        # As if it had been trained where it is by default
        "transcript": printed.replace(str(folder), "models/sft_specialist").strip().split("\n"),
    }


def evaluate(folder: Path, *arguments) -> dict:
    """The figures of each system on held-out notes."""
    output = folder.with_name(f"{folder.name}.evaluation")
    shutil.rmtree(output, ignore_errors=True)
    model = ("--model_path", folder / "final_model", "--output_dir", output)
    minutes = run("sft_evaluation.py", *model, *arguments)[1]
    found = json.loads((output / "evaluation.json").read_text())
    systems = {
        system: {name: values[name]["value"] for name in FIGURES if name in values}
        for system, values in found["figures"].items()
    }
    return {"n_notes": found["n_notes"], "minutes": minutes, "systems": systems}


def measure_losses() -> dict:
    return train(RUNS / "default")


def measure_evaluation() -> dict:
    folder = RUNS / "default"
    if not (folder / "final_model").is_dir():
        train(folder)
    return evaluate(folder)


def mts_files() -> list[str]:
    """The options that name MTS-Dialog's rows, of training those in a file of their own."""
    file = RUNS / "mts_train.csv"
    rows = factual_rows(read_rows(MTS_DIALOG / "train.csv"))
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(COLUMNS)
        chosen = random.Random(42).sample(rows, min(N_MTS_ROWS, len(rows)))
        writer.writerows([getattr(row, column) for column in COLUMNS] for row in chosen)
    return ["--train_csv", str(file)]


def measure_preset(rows: str, preset: str) -> dict:
    """One preset on the training rows of one data set, evaluated on its test notes."""
    folder = RUNS / f"{rows}_{preset}"
    own = mts_files() if rows == "mts" else []
    validation = ["--val_csv", MTS_DIALOG / "validation.csv"] if own else []
    test = ["--test_csv", MTS_DIALOG / "test.csv", "--n_rows", N_TEST_NOTES] if own else []
    trained = train(folder, "--preset", preset, *own, *validation)
    del trained["transcript"]
    systems = ["--systems", "free", "verified", "quote", "reference"]
    return trained | {"evaluation": evaluate(folder, *own, *test, *systems)}


def measure_inference() -> dict:
    """The table of inference_throughput.py, with README's options."""
    options = "--rounds 1 --mts 28 --aci 4 --max_new_tokens 80".split()
    if not (RUNS / "default" / "final_model").is_dir():
        train(RUNS / "default")
    model = ("--model_path", RUNS / "default" / "final_model")
    printed, minutes = run("benchmarks/inference_throughput.py", *options, *model)
    return {"table": [line for line in printed.split("\n") if line.startswith("|")], "minutes": minutes}


def jobs() -> dict:
    """What measures each section."""
    data_sets = ["phase1", "mts"] if MTS_DIALOG.is_dir() else ["phase1"]
    presets = {
        f"presets/{rows}/{preset}": lambda rows=rows, preset=preset: measure_preset(rows, preset)
        for rows in data_sets
        for preset in PRESETS
    }
    first = {"losses": measure_losses, "evaluation": measure_evaluation}
    return first | presets | {"inference": measure_inference}


# ------------------------------------------------------------------------------- in the documents


def percent(share: float | None) -> str:
    return "" if share is None else str(int(100 * share + 0.5))


def hundredths(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".removeprefix("0")


def gigabytes(mebibytes: float) -> str:
    return f"{mebibytes * 2**20 / 1e9:.1f} GB"


def transcript(numbers: dict) -> list[str]:
    return ["```text", *numbers["losses"]["transcript"], "```"]


def losses_table(numbers: dict) -> list[str]:
    found = numbers["losses"]
    losses = ", ".join(f"{loss:.4f}" for loss in [found["untrained_val_loss"], *found["val_loss"]])
    speeds = " and ".join(f"{speed:.0f}" for speed in found["tokens_per_second"])
    memory = gigabytes(found["peak_memory_mb"])
    return [
        "| `python stage_a_sft_training.py`, phase1_data, 132 rows, 2 epochs | |",
        "|---|---|",
        f"| time | {found['minutes']:.1f} minutes |",
        f"| validation loss: untrained, epoch 1, epoch 2 | {losses} |",
        f"| tokens/s in epochs 1 and 2 (all tokens; a third of them carry loss) | {speeds} |",
        f"| peak memory | {memory} |",
    ]


SYSTEMS = {
    "base": "base",
    "base_examples": "base, 2 examples",
    "free": "free",
    "verified": "verified",
    "quote": "quoted",
    "lead": "first and last sentences",
    "reference": "reference",
}
ROWS = {
    "clean": ("summaries without a finding of the check, %", percent),
    "rewritten": ("findings per 100 rewritten sentences", percent),
    "coverage": ("facts of the reference held, %", percent),
    "rougeL": ("ROUGE-L", hundredths),
    "loss": ("loss per token, nats", hundredths),
    "copied": ("copied words, %", percent),
}


def evaluation_table(numbers: dict) -> list[str]:
    systems = numbers["evaluation"]["systems"]
    lines = [f"| | {' | '.join(SYSTEMS.values())} |", f"|---|{'--:|' * len(SYSTEMS)}"]
    for name, (label, shown) in ROWS.items():
        cells = [shown(systems.get(system, {}).get(name)) for system in SYSTEMS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


PRESETS_HEADING = (
    "rows, preset | Val Loss untrained, trained | verified: own sentences, % | free: facts held, % | check score "
    "| ROUGE-L | minutes | peak memory"
)


def presets_table(numbers: dict) -> list[str]:
    lines = [f"| {PRESETS_HEADING} |", f"|---|{'--:|' * PRESETS_HEADING.count('|')}"]
    for name, found in numbers.items():
        if not name.startswith("presets/"):
            continue
        _, rows, preset = name.split("/")
        systems = found["evaluation"]["systems"]
        free = systems["free"]
        cells = [
            f"{'phase1_data' if rows == 'phase1' else 'MTS-Dialog'}, `{preset}`",
            f"{found['untrained_val_loss']:.4f}, {found['best_val_loss']:.4f}",
            percent(systems.get("verified", {}).get("own_share")),
            percent(free["coverage"]),
            hundredths(free["check_score"]),
            hundredths(free["rougeL"]),
            f"{found['minutes']:.1f}",
            gigabytes(found["peak_memory_mb"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def throughput_table(numbers: dict) -> list[str]:
    """README's four rows of training_throughput.py: rows/s and peak memory, medians."""
    shapes = [numbers["throughput"][name] for name in ("short", "mts")]
    peers = {
        "this toolkit": "toolkit",
        "TRL 1.16 SFTTrainer, its default": "trl",
        "TRL, the fastest of three other settings": None,
        "Hugging Face Trainer": "hugging_face",
    }
    lines = [
        "| | short rows (60 to 120 tokens): rows/s | peak memory "
        "| MTS-Dialog rows (up to 512 tokens): rows/s | peak memory |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, peer in peers.items():
        cells = []
        for section in shapes:
            runs = section["runs"][peer or section["best_of_trl"]]
            seconds = statistics.median(run["seconds"] for run in runs)
            speed = f"{section['counts']['n_rows'] / seconds:.2f}"
            memory = statistics.median(run["peak_memory_mb"] for run in runs)
            cells += [f"**{speed}**" if peer == "toolkit" else speed, gigabytes(memory)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


FRAGMENTS = {
    "transcript": transcript,
    "losses": losses_table,
    "evaluation": evaluation_table,
    "presets": presets_table,
    "throughput": throughput_table,
    "inference": lambda numbers: numbers["inference"]["table"],
}


def with_numbers(text: str, numbers: dict) -> str:
    """The text of a document with the figures in their places, as far as they were measured."""

    def fill(place: re.Match) -> str:
        try:
            lines = FRAGMENTS[place[2]](numbers)
        except KeyError as missing:
            if missing.args[0] == place[2] and place[2] not in FRAGMENTS:
                raise
            return place[0]
        return place[1] + "\n".join(lines) + place[4] if lines else place[0]

    # A mark of the tests may stand between the place and its block
    pattern = r"(<!-- numbers: (\w+) -->\n(?:<!-- .*? -->\n)*\n?)(.*?)(\n<!-- end -->)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def read_numbers(file: Path) -> dict:
    numbers = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    throughput = ROOT / "docs" / "training_throughput.json"
    return numbers | {"throughput": json.loads(throughput.read_text(encoding="utf-8"))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", metavar="SECTION", help=", ".join(jobs()))
    arguments = parser.parse_args()
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.is_file() else {}
    for name, measure in jobs().items():
        if arguments.only is None:
            is_wanted = name not in numbers
        else:
            is_wanted = any(f"{name}/".startswith(f"{wanted.rstrip('/')}/") for wanted in arguments.only)
        if is_wanted:
            log(name)
            numbers[name] = measure() | {"made": made()}
            write_atomic(NUMBERS, json.dumps(numbers, indent=1) + "\n", 0o644)
    for file in DOCUMENTS:
        text = file.read_text(encoding="utf-8")
        write_atomic(file, with_numbers(text, read_numbers(NUMBERS)), 0o644)


if __name__ == "__main__":
    main()
