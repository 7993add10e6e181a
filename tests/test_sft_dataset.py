"""The script sft_dataset.py: its report, and the export of preference pairs."""

import json
import re
import sys

import pytest
from conftest import ROOT, run_python
from tiny import NOTES, encoder_for, rows_of

from sft.cli import InputError
from sft.data.dataset import SFTDataset
from sft.files import is_bundled, sha256
from sft_dataset import describe_rows, main, show_spans


@pytest.fixture
def arguments(csv_files, model_folder):
    train_csv, val_csv = csv_files
    return ["--train_csv", train_csv, "--val_csv", val_csv, "--model_name", model_folder()]


def test_report_holds_counts_and_no_text(arguments, tmp_path):
    pairs_file = tmp_path / "pairs.jsonl"
    result = run_python("sft_dataset.py", *arguments, "--export_preferences", pairs_file)
    assert result.returncode == 0, result.stderr
    assert re.search(r"factual +11", result.stdout)
    assert re.search(r"wrong_number +1", result.stdout)
    assert len(re.findall(r"v0 \(\d\d% like t0\)", result.stderr)) == 1
    assert "Wrote 1 preference pair to" in result.stderr
    for texts in NOTES:
        assert not any(text in result.stdout + result.stderr for text in texts)
    (pair,) = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    assert pair["chosen"] == NOTES[0][1]
    assert pair["rejected"] == "Influenza B with fever."
    assert pair["factual_id"] == "t0"
    assert NOTES[0][0] in pair["prompt"]
    assert pair["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name, words", [("taken.jsonl", "exists"), ("pairs.csv", "use .jsonl")])
def test_preferences_overwrite_nothing(tmp_path, monkeypatch, name, words):
    (tmp_path / "taken.jsonl").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["sft_dataset.py", "--export_preferences", str(tmp_path / name)])
    with pytest.raises(InputError, match=words):
        main()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "max_length, what_fits",
    [
        (512, "  0 notes shortened, 0 rows left out at --max_length 512"),
        (150, "  1 note shortened, 1 row left out at --max_length 150"),
    ],
)
def test_report_on_rows_that_do_not_fit(max_length, what_fits):
    rows = rows_of([NOTES[3], NOTES[3], ("Fever. " * 60, "Fever."), ("Cough.", "No cough. " * 30)])
    report = describe_rows("x.csv", rows, SFTDataset(rows, encoder_for("none"), max_length))
    assert report.splitlines()[0] == "x.csv"
    assert report.splitlines()[-1] == what_fits


def test_the_report_encodes_nothing():
    rows = rows_of(NOTES)
    dataset = SFTDataset(rows, encoder_for("none"), 512)
    dataset.encoder.tokenizer = None
    assert "median" in describe_rows("x.csv", rows, dataset)


def test_spans_of_the_first_example():
    dataset = SFTDataset(rows_of(NOTES), encoder_for("chatml"), 512)
    shown = show_spans(dataset)
    prompt, target = shown.split("[summary and end token, loss")
    assert NOTES[0][0] in prompt
    assert NOTES[0][1] in target
    assert NOTES[0][1] not in prompt


def test_only_unchanged_sample_data_is_bundled(tmp_path):
    bundled = ROOT / "phase1_data" / "sft" / "train_set_processed.csv"
    assert is_bundled(sha256(bundled))
    changed = tmp_path / bundled.name
    changed.write_bytes(bundled.read_bytes() + b"\n")
    assert not is_bundled(sha256(changed))
