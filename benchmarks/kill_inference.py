"""Is a file of summaries identical to the byte after its process was killed again and again?

    python benchmarks/kill_inference.py [--kills 20] [--notes 500] [--model_path FOLDER]

Without --model_path a tiny random model is trained first. The file is written once undisturbed, then under
SIGKILLs at random moments, each followed by the same command with --resume; .jsonl and .csv in turn."""

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def tiny_specialist(folder: Path) -> Path:
    from tiny import NOTES, tiny_model, tiny_tokenizer, write_csv

    from sft.options import TrainConfig
    from stage_a_sft_training import train

    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = [(f"r{i}", note, summary, "factual", "") for i, (note, summary) in enumerate(NOTES)]
    path = str(write_csv(folder / "rows.csv", rows))
    config = TrainConfig(
        train_csv=path,
        val_csv=path,
        model_name=str(folder / "base"),
        output_dir=str(folder / "out"),
        num_epochs=1,
        max_length=256,
        device="cpu",
    )
    train(config)
    return folder / "out" / "final_model"


def write_notes(path: Path, n: int, seed: int) -> None:
    """Notes of 1 to 12 sentences, some of them empty."""
    from tiny import NOTES

    source = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "clinical_note"])
        for i in range(n):
            chosen = source.choices([note for note, _ in NOTES], k=source.randrange(1, 12))
            writer.writerow([f"n{i}", " ".join(chosen) if source.random() > 0.02 else ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--notes", type=int, default=500)
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument(
        "--batch_size", type=int, default=8, help="small, so that there are many windows to be killed in"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_path = arguments.model_path or tiny_specialist(folder)
        write_notes(folder / "notes.csv", arguments.notes, arguments.seed)
        command = [sys.executable, "sft_inference.py", "--device", "cpu", "--model_path", model_path]
        command += ["--input_file", folder / "notes.csv", "--batch_size", arguments.batch_size]
        command += ["--max_new_tokens", arguments.max_new_tokens, "--temperature", 0.7, "--writing", "free"]
        n_csv = arguments.kills // 2
        for kind, n_kills in ((".jsonl", arguments.kills - n_csv), (".csv", n_csv)):
            whole = folder / f"whole{kind}"
            seconds = write_undisturbed(command, whole)
            write_killed(command, whole, folder / f"killed{kind}", n_kills, seconds, source)


def start(command: list, target: Path, *more: str) -> subprocess.Popen:
    words = [str(word) for word in [*command, "--output_file", target, *more]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)


def write_undisturbed(command: list, target: Path) -> float:
    """Writes the file once; the seconds it took."""
    started = time.perf_counter()
    process = start(command, target)
    err = process.communicate()[1]
    seconds = time.perf_counter() - started
    assert process.returncode == 0, err
    last_line = err.strip().splitlines()[-1]
    print(f"{target.suffix}: undisturbed in {seconds:.1f} s; {last_line.partition('; ')[0]}")
    return seconds


def write_killed(
    command: list, whole: Path, target: Path, n_kills: int, seconds: float, source: random.Random
) -> None:
    """Kills and resumes until there were `n_kills`. A file that is complete before that is compared, and
    another begun. Exits with status 1 if one differs from `whole`."""
    partial = Path(f"{target}.partial")
    n_killed = 0
    n_files = 0
    while n_killed < n_kills:
        n_files += 1
        target.unlink(missing_ok=True)
        while not target.exists():
            process = start(command, target, "--resume")
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=source.uniform(0, seconds) if n_killed < n_kills else None)
            if process.poll() is None:
                process.kill()
                process.communicate()
                n_killed += 1
                n_bytes = partial.stat().st_size if partial.exists() else 0
                print(f"  kill {n_killed}: {n_bytes:,} of {whole.stat().st_size:,} bytes written", flush=True)
        is_same = target.read_bytes() == whole.read_bytes()
        verdict = "identical to the byte" if is_same else "DIFFERS"
        print(f"{target.suffix}: {n_killed} kills, resumed file {n_files} {verdict}", flush=True)
        if not is_same:
            sys.exit(1)


if __name__ == "__main__":
    main()
