"""The shared cases: small files that showed faults once, each as its README says that a user expects it.

Elsewhere: numbers in summaries (test_check.py), summaries in a loop (test_decoding.py), and pastes into a
terminal (test_chat.py), whose texts are read as files here."""

import contextlib
import io
import json
import re
import sys

import pytest
from conftest import ROOT
from tiny import encoder_for, tiny_tokenizer

import sft_inference
from sft.cli import InputError, RunError
from sft.data.dataset import load_datasets, read_data
from sft.data.preferences import find_pairs
from sft.data.report import log_data_warnings
from sft.data.rows import factual_rows, read_rows
from sft.grounding.citations import cited_sentence_numbers, has_citation
from sft.grounding.sentences import split_sentences
from sft.inference.chat import read_piped
from sft.inference.notes import read_notes
from sft.options import DataOptions, InferenceConfig

CASES = ROOT.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"no {CASES}")


def checked(train: str, validation: str | None = None, **options):
    """(training set, validation set) as sft_dataset.py checks them; warnings are logged."""
    validation = validation or train
    config = DataOptions(train_csv=str(CASES / train), val_csv=str(CASES / validation), **options)
    rows = read_data(config)
    datasets = load_datasets(rows, tiny_tokenizer(), config)
    log_data_warnings(rows, datasets, config)
    return datasets


def options_in(fix: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+) (\w+)", fix))


@pytest.fixture(scope="module")
def adapter(finished):
    return f"{finished().output_dir}/final_model"


@pytest.fixture
def infer(adapter, monkeypatch):
    """infer(*arguments): the script sft_inference.py in this process."""

    def run(*arguments: str) -> None:
        words = ["--model_path", adapter, "--device", "cpu", "--max_new_tokens", "3", *arguments]
        monkeypatch.setattr(sys, "argv", ["sft_inference.py", *words])
        sft_inference.main()

    return run


# ------------------------------------------------------------------------------- training rows


def test_01_long_dialogue():
    with pytest.raises(InputError, match=r"all of the notes' text \([\d,]+ tokens in 4 rows\)") as error:
        checked("01_long_dialogue.csv")
    needed = int(options_in(error.value.fix)["max_length"])
    train, _ = checked("01_long_dialogue.csv", max_length=needed)
    assert len(train) == 4
    assert train.shortened == []


def test_06_labels():
    with pytest.raises(InputError, match="no row has a known label; found 2 kinds: 4 no, 4 yes") as error:
        read_rows(CASES / "06_labels.csv")
    assert 'map each label to factual or hallucinated: --label_map "no=?,yes=?"' in error.value.fix
    rows = read_rows(CASES / "06_labels.csv", DataOptions(label_map="NO=factual, yes = hallucinated"))
    assert [row.label for row in rows[:2]] == ["factual", "hallucinated"]
    with pytest.raises(InputError, match="does not map"):
        read_rows(CASES / "06_labels.csv", DataOptions(label_map="no=good"))


@pytest.mark.parametrize(
    "name, fix",
    [
        ("07_alpaca.json", "--note_column input --summary_column output --label factual"),
        ("07_records.jsonl", "--note_column inputs --summary_column target --label factual"),
        ("12_other_columns.csv", "--note_column transcription --summary_column description --label factual"),
        ("12_no_id.csv", "or use --label factual"),
    ],
)
def test_columns_of_training_rows(name, fix):
    with pytest.raises(InputError) as error:
        read_rows(CASES / name)
    assert fix in error.value.fix
    rows = read_rows(CASES / name, DataOptions(**options_in(fix)))
    assert rows[0].name in ("row 1", "row 2")
    assert rows[0].label == "factual"


def test_09_ids_with_space(capfd):
    train, _ = checked("09_ids_with_space.csv")
    logged = capfd.readouterr().err
    assert "not shown" not in logged
    assert re.search(r"rows? 2\b", logged)
    assert train.rows[0].name == "row 2"


def test_10_empty_cells(capfd):
    counts = "8 with an empty clinical_note, 4 with an empty model_summary"
    with pytest.raises(InputError, match=counts) as error:
        read_rows(CASES / "10_empty_cells.csv")
    assert "--skip_empty" in error.value.fix
    assert len(read_rows(CASES / "10_empty_cells.csv", DataOptions(skip_empty=True))) == 14
    assert f"10 rows left out: {counts}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "train, validation, words",
    [
        ("11_paraphrase_train.csv", "11_paraphrase_val.csv", ["3 validation rows", "p0 (", "p1 (", "p2 ("]),
        ("more/nfc.csv", "more/nfd.csv", ["2 validation rows", "1 (100% like 1), 2 (100% like 2)"]),
        ("more/train.csv", "more/val.csv", ["3 validation rows", "v0 (", "v1 (", "v2 ("]),
    ],
)
def test_leaks(capfd, train, validation, words):
    checked(train, validation)
    logged = capfd.readouterr().err
    assert all(word in logged for word in words), logged


def test_half_cited(capfd):
    train, _ = checked("more/half_cited.csv")
    logged = capfd.readouterr().err
    assert "5 rows whose summaries cite sentences, which the prompt does not number" in logged
    assert "ids t0, t1, t2, t3, t4" in logged
    assert not any(has_citation(row.model_summary) for row in train.rows)


def test_bad_cited():
    summaries = {row.id: row.model_summary for row in read_rows(CASES / "more" / "bad_cited.csv")}
    assert all(map(has_citation, summaries.values()))
    assert cited_sentence_numbers(summaries["t0"]) == [2, 1]


@pytest.mark.parametrize("name, ids", [("pairs", ["2", "6"]), ("no_pairs", []), ("both_labels", ["4"])])
def test_preference_pairs(capfd, name, ids):
    rows = read_rows(CASES / "more" / f"{name}.csv")
    encoder = encoder_for("llama3")
    with contextlib.nullcontext() if ids else pytest.raises(InputError, match="no pair"):
        pairs = find_pairs("x.csv", rows, encoder, 256)
        assert [pair["id"] for pair in pairs] == ids
        assert all(pair["shortened"] == (pair["id"] == "6") for pair in pairs)
    logged = capfd.readouterr().err
    if name == "both_labels":
        assert "whose summary another row of the same note calls factual: id 3" in logged
    else:
        assert "2 hallucinated rows without a factual summary of the same note" in logged


def test_sound_companions():
    train, validation = (factual_rows(read_rows(CASES / "more" / f"{name}.csv")) for name in ("train", "val"))
    assert (len(train), len(validation)) == (11, 3)


# ------------------------------------------------------------------------------- notes


@pytest.mark.parametrize("name", ["02_one_letter", "05_wrapped_72", "two_line_wrapped", "slow_paste_note"])
def test_one_note(monkeypatch, name):
    path = CASES / f"{name}.txt"
    with pytest.raises(InputError, match="looks like notes of several lines") as error:
        read_notes(path)
    assert "--one_note" in error.value.fix
    (note,) = read_notes(path, InferenceConfig(one_note="file"))
    assert note.text.split() == path.read_text().split()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    if "\n\n" in path.read_text():
        with pytest.raises(InputError, match="looks like notes of several paragraphs"):
            read_piped("auto")


@pytest.mark.parametrize("name", ["05_unwrapped", "paste_long_line_while_writing"])
def test_a_note_of_one_line(name):
    (note,) = read_notes(CASES / f"{name}.txt")
    assert note.text.strip() == (CASES / f"{name}.txt").read_text().strip()


def test_05_sentences_of_wrapped_lines():
    wrapped, unwrapped, two_lines = (
        (CASES / f"{name}.txt").read_text() for name in ("05_wrapped_72", "05_unwrapped", "two_line_wrapped")
    )
    assert split_sentences(wrapped) == split_sentences(unwrapped)
    assert split_sentences(two_lines) == [
        "The patient denies chest pain and has no fever.",
        "Penicillin allergy: rash.",
    ]


@pytest.mark.parametrize(
    "name, column",
    [
        ("07_alpaca.json", "input"),
        ("07_records.jsonl", "inputs"),
        ("12_other_columns.csv", "transcription"),
        ("mimic_columns.csv", "text"),
    ],
)
def test_columns_of_notes(name, column):
    """Only what is needed is asked for."""
    with pytest.raises(InputError, match="no column clinical_note in the header") as error:
        read_notes(CASES / name)
    assert options_in(error.value.fix) == {"note_column": column}
    assert read_notes(CASES / name, InferenceConfig(note_column=column))[0].text


@pytest.mark.parametrize(
    "name, options, ids, words",
    [
        ("float_ids.jsonl", {}, ["3", "4", None], "1 row without an id (row 3)"),
        ("note_id_column.csv", {}, [None, None, None], "add --id_column note_id"),
        ("note_id_column.csv", {"id_column": "note_id"}, ["90017", "90003", "90042"], ""),
        ("mimic_columns.csv", {"note_column": "TEXT"}, [None, None, None], "add --id_column row_id"),
        ("12_no_id.csv", {}, [None], ""),
    ],
)
def test_ids(capfd, name, options, ids, words):
    assert [note.id for note in read_notes(CASES / name, InferenceConfig(**options))] == ids
    assert words in capfd.readouterr().err


FORMATS = {
    "mimic": None,
    "rtf": "the note looks like RTF",
    "html": "the note was HTML: its tags are left out",
    "hl7": "the note looks like an HL7 v2 message",
    "cda": "the note was XML: its tags are left out",
    "synthea": "the note looks like a printed record (Synthea?)",
    "table": None,
}


def test_formats(infer, capsys):
    infer("--input_file", str(CASES / "formats.jsonl"), "--json")
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["id"] for result in results] == list(FORMATS)
    for result in results:
        found = [words for words in result["warnings"] if re.match(r"the note (looks|was)", words)]
        expected = FORMATS[result["id"]]
        assert found == ([expected] if expected else [])
    assert "1 note: the note looks like RTF" in err


def test_all_empty(infer, capsys):
    with pytest.raises(RunError, match="all 3 notes failed"):
        infer("--input_file", str(CASES / "all_empty.csv"))
    assert "3 notes: the note is empty" in capsys.readouterr().err


def test_json_ascii_stdout(infer, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    infer("--input_file", str(CASES / "json_ascii_stdout.jsonl"), "--json")
    assert json.loads(out.getvalue())["id"] == "Müller µ1"


def test_ollama_recipe(adapter, tmp_path):
    """The prompt that a merged folder's template makes is the trained one."""
    from transformers import AutoTokenizer

    (note,) = re.findall(r"^Note: (.+)", (CASES / "ollama_recipe.txt").read_text(), re.MULTILINE)
    inference = sft_inference.SFTInference(adapter, device="cpu", merge=False)
    inference.save_merged(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    message = {"role": "user", "content": note}
    assert tokenizer.apply_chat_template([message], return_dict=False) == inference.prompt_ids(note, 1)[0]
    assert (tmp_path / "merged" / "Modelfile").is_file()
