"""Is a file of summaries the same to the byte after the process was killed again and again?

    python benchmarks/kill_inference.py [--kills 20] [--notes 500] [--model_path models/sft_specialist/final_model]

Without --model_path a tiny random model is trained first. The file is written once undisturbed, then under SIGKILLs at
random moments, each followed by the same command with --resume; .jsonl and .csv in turn.
"""

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
    rows = str(
        write_csv(
            folder / "rows.csv",
            [(f"r{i}", note, summary, "factual", "") for i, (note, summary) in enumerate(NOTES)],
        )
    )
    paths = {
        "train_csv": rows,
        "val_csv": rows,
        "model_name": str(folder / "base"),
        "output_dir": str(folder / "out"),
    }
    train(TrainConfig(**paths, num_epochs=1, max_length=256, device="cpu"))
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
        command = [
            sys.executable,
            "sft_inference.py",
            "--model_path",
            model_path,
            "--input_file",
            folder / "notes.csv",
            "--device",
            "cpu",
        ]
        command += [
            "--max_new_tokens",
            arguments.max_new_tokens,
            "--batch_size",
            arguments.batch_size,
            "--temperature",
            0.7,
        ]

        def start(target: Path, *more: str) -> subprocess.Popen:
            words = [str(word) for word in [*command, "--output_file", target, *more]]
            return subprocess.Popen(
                words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )

        kills = {".jsonl": arguments.kills - arguments.kills // 2, ".csv": arguments.kills // 2}
        for kind, n_kills in kills.items():
            whole, target = folder / f"whole{kind}", folder / f"killed{kind}"
            started = time.perf_counter()
            undisturbed = start(whole)
            said = undisturbed.communicate()[1]
            seconds = time.perf_counter() - started
            assert undisturbed.returncode == 0, said
            print(
                f"{kind}: undisturbed in {seconds:.1f} s; {said.strip().splitlines()[-1].partition('; ')[0]}"
            )
            killed = files = 0
            while (
                killed < n_kills
            ):  # a file that gets finished between two kills is compared, and another begun
                files += 1
                target.unlink(missing_ok=True)
                while not target.exists():
                    process = start(target, "--resume")
                    with suppress(subprocess.TimeoutExpired):
                        process.communicate(timeout=source.uniform(0, seconds) if killed < n_kills else None)
                    if process.poll() is None:
                        process.kill()
                        process.communicate()
                        killed += 1
                        begun = (
                            Path(f"{target}.partial").stat().st_size
                            if Path(f"{target}.partial").exists()
                            else 0
                        )
                        print(
                            f"  kill {killed}: {begun:,} of {whole.stat().st_size:,} bytes written",
                            flush=True,
                        )
                same = target.read_bytes() == whole.read_bytes()
                print(
                    f"{kind}: {killed} kills, resumed file {files} {'identical to the byte' if same else 'DIFFERS'}",
                    flush=True,
                )
                if not same:
                    sys.exit(1)


if __name__ == "__main__":
    main()
