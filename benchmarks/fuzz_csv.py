"""Thousands of damaged CSVs: does any end in something other than rows or a two-line refusal?

    python benchmarks/fuzz_csv.py --seconds 120 --seed 0

Damages a valid CSV at random (bytes, quotes, delimiters, line ends, encodings, columns, cut off, huge cells)
and puts it through reading, tokenizing, the report and inference's reader. Fails if anything but InputError
is raised, a refusal has more than two lines, or a message holds the phrase planted in every text. Prints the
number of files."""

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
from sft.data.dataset import load_datasets, read_data
from sft.data.report import log_data_warnings
from sft.inference.notes import read_notes
from sft.options import DataOptions
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
OTHER_ENCODINGS = [
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
ENCODINGS = ["utf-8"] * 4 + OTHER_ENCODINGS


def valid_csv(dice: random.Random) -> str:
    columns = HEADER + dice.choices(["author", "", "label", "Clinical Note"], k=dice.choice([0, 0, 0, 1, 3]))
    dice.shuffle(columns)
    rows = [columns]
    for i, (note, summary) in enumerate(dice.choices(NOTES, k=dice.randint(0, 8))):
        citation = dice.choice(["", "", " [Evidence: S1,2; Conf: 0.95]"])
        n_repeats = dice.choice([1, 1, 1, 40])
        ending = dice.choice(["", "", " 38,5 °C", " é😀", "\u200f", "\n\n", ' "x"'])
        label = dice.choice(["factual"] * 6 + ["hallucinated", "Factual ", "FACTUAL", "true", ""])
        cells = {
            "id": i,
            "clinical_note": f"{PHRASE} {note}" * n_repeats + ending,
            "model_summary": f"{PHRASE} {summary}{citation}",
            "label": label,
        }
        rows.append([cells.get(name, "") for name in columns])
    buffer = io.StringIO(newline="")
    writer = csv.writer(
        buffer,
        delimiter=dice.choice(",,,;\t|"),
        lineterminator=dice.choice(["\n", "\r\n", "\r"]),
        quoting=dice.choice([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    )
    writer.writerows(rows)
    return buffer.getvalue()


def damaged(data: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.choice([0, 1, 1, 2, 5, 30])):
        position = dice.randint(0, len(data))
        before = data[:position]
        after = data[position:]
        kind = dice.randrange(6)
        if kind == 0 and data:
            flipped = bytearray(data)
            flipped[min(position, len(data) - 1)] ^= 1 << dice.randrange(8)
            data = bytes(flipped)
        elif kind == 1:
            data = before + dice.choice(PIECES) * dice.choice([1, 1, 1, 50]) + after
        elif kind == 2:
            data = before + after[dice.randint(1, 40) :]
        elif kind == 3:
            data = before + dice.randbytes(dice.randint(1, 8)) + after
        elif kind == 4 and dice.random() < 0.2:
            data = before
        elif dice.random() < 0.02:
            data = before + b"Fever. " * dice.choice([30_000, 200_000]) + after
    return data


def check_data(path: Path, tokenizer) -> None:
    """Everything that a user's file goes through before training."""
    options = DataOptions(train_csv=str(path), val_csv=str(path), max_length=256)
    rows = read_data(options)
    datasets = load_datasets(rows, tokenizer, options)
    describe_rows(path, rows[0], datasets[0])
    log_data_warnings(rows, datasets, options)


def check_case(case: int, path: Path, tokenizer, counts: Counter) -> None:
    dice = random.Random(case)
    path.write_bytes(damaged(valid_csv(dice).encode(dice.choice(ENCODINGS), "replace"), dice))
    logged = io.StringIO()
    for reader in (lambda: check_data(path, tokenizer), lambda: read_notes(path)):
        try:
            with contextlib.redirect_stderr(logged):
                reader()
            counts["read"] += 1
        except InputError as error:
            assert str(error).count("\n") <= 1, f"case {case}: more than two lines"
            logged.write(str(error))
            counts["refused"] += 1
        except BaseException:
            print(f"case {case} (repeat it with --seed {case})", file=sys.stderr)
            raise
    assert PHRASE not in logged.getvalue(), f"case {case}: a message holds text"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = tiny_tokenizer()
    counts = Counter()
    case = arguments.seed
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            check_case(case, Path(folder) / "fuzz.csv", tokenizer, counts)
            case += 1
    print(
        f"{case - arguments.seed:,} files in {arguments.seconds:g} s from seed {arguments.seed}:"
        f" {counts['read']:,} readings succeeded, {counts['refused']:,} were refused"
    )


if __name__ == "__main__":
    main()
