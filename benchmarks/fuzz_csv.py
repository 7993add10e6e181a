"""Damaged CSVs by the thousand: does anything end in more than rows or a two-line refusal?

    python benchmarks/fuzz_csv.py --seconds 120 --seed 0

Damages a valid CSV at random (bytes, quotes, delimiters, line ends, encodings, columns, cut off, huge cells) and puts it
through reading, tokenising, the report and inference's reader. Fails where anything but InputError is raised, a refusal
has more than two lines, or a message holds the phrase planted in every text. Prints the number of files.
"""

import argparse
import contextlib
import csv
import io
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import HEADER, NOTES, tiny_tokenizer

from sft.cli import InputError
from sft.data.dataset import load_datasets, warn_about_leaks, warn_about_rows
from sft.data.rows import read_rows
from sft.inference.note_files import read_notes
from sft_dataset import describe_rows

PHRASE = "SECRETPHRASE"
PIECES = [
    b'"',
    b'""',
    b",",
    b";",
    b"\t",
    b"\n",
    b"\r",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\xe9",
    b"\xef\xbb\xbf",
    b"\xe2\x80\x8f",
    b"factual",
    b"\x1a",
    b"=",
]
ENCODINGS = ["utf-8"] * 4 + [
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "cp1252",
    "cp850",
    "mac_roman",
    "cp1251",
    "shift_jis",
]


def valid_csv(dice: random.Random) -> str:
    columns = HEADER + dice.choices(["author", "", "label", "Clinical Note"], k=dice.choice([0, 0, 0, 1, 3]))
    dice.shuffle(columns)
    rows = [columns]
    for i, (note, summary) in enumerate(dice.choices(NOTES, k=dice.randint(0, 8))):
        citation = dice.choice(["", "", " [Evidence: S1,2; Conf: 0.95]"])
        note = f"{PHRASE} {note}" * dice.choice([1, 1, 1, 40]) + dice.choice(
            ["", "", " 38,5 °C", " é😀", "\u200f", "\n\n", ' "x"']
        )
        cells = {"id": i, "clinical_note": note, "model_summary": f"{PHRASE} {summary}{citation}"}
        cells["label"] = dice.choice(["factual"] * 6 + ["hallucinated", "Factual ", "FACTUAL", "true", ""])
        rows.append([cells.get(name, "") for name in columns])
    buffer = io.StringIO(newline="")
    form = {
        "delimiter": dice.choice(",,,;\t|"),
        "lineterminator": dice.choice(["\n", "\r\n", "\r"]),
        "quoting": dice.choice([0, 0, 1]),
    }
    csv.writer(buffer, **form).writerows(rows)
    return buffer.getvalue()


def damaged(data: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.choice([0, 1, 1, 2, 5, 30])):
        at = dice.randint(0, len(data))
        kind = dice.randrange(6)
        if kind == 0 and data:
            flipped = bytearray(data)
            flipped[min(at, len(data) - 1)] ^= 1 << dice.randrange(8)
            data = bytes(flipped)
        elif kind == 1:
            data = data[:at] + dice.choice(PIECES) * dice.choice([1, 1, 1, 50]) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + dice.randint(1, 40) :]
        elif kind == 3:
            data = data[:at] + dice.randbytes(dice.randint(1, 8)) + data[at:]
        elif kind == 4 and dice.random() < 0.2:
            data = data[:at]
        elif dice.random() < 0.02:
            data = data[:at] + b"Fever. " * dice.choice([30_000, 200_000]) + data[at:]
    return data


def go_through(path: Path, tokenizer) -> None:
    """All that a user's file meets before training."""
    rows = read_rows(path), read_rows(path)
    datasets = load_datasets(
        path, path, tokenizer, max_length=256, rows=rows, cache_dir=path.parent / "cache"
    )
    describe_rows(path, rows[0], datasets[0])
    warn_about_rows(path, rows[0], datasets[0])
    warn_about_leaks(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer, counts, case = tiny_tokenizer(), Counter(), arguments.seed
    until = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.csv"
        while time.monotonic() < until:
            dice = random.Random(case)
            path.write_bytes(damaged(valid_csv(dice).encode(dice.choice(ENCODINGS), "replace"), dice))
            said = io.StringIO()
            for reader in (lambda: go_through(path, tokenizer), lambda: list(read_notes(path))):
                try:
                    with contextlib.redirect_stderr(said):
                        reader()
                    counts["read"] += 1
                except InputError as error:
                    assert str(error).count("\n") <= 1, f"case {case}: more than two lines"
                    said.write(str(error))
                    counts["refused"] += 1
                except BaseException:
                    print(f"case {case} (repeat it with --seed {case})", file=sys.stderr)
                    raise
            assert PHRASE not in said.getvalue(), f"case {case}: a message holds text"
            case += 1
    print(
        f"{case - arguments.seed:,} files in {arguments.seconds:g} s from seed {arguments.seed}: {counts['read']:,} readings went through, {counts['refused']:,} were refused"
    )


if __name__ == "__main__":
    main()
