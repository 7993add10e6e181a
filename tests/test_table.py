"""Tables of every format give the same text; columns and labels of other names; each refusal has its fix."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import NOTES, tiny_tokenizer, write_csv

from sft.cli import InputError
from sft.data.dataset import create_sft_dataloaders, read_data
from sft.data.rows import read_rows, shown_kinds
from sft.data.table import read_table
from sft.options import DataOptions

RECORDS = [
    {"id": 3.0, "clinical_note": "NA 128", "model_summary": "nan", "label": "factual"},
    {"id": "007", "clinical_note": "None", "model_summary": "1.50", "label": "hallucinated"},
]


def texts(rows) -> list[tuple]:
    return [(row.id, row.clinical_note, row.model_summary, row.label) for row in rows]


READ = [("3", "NA 128", "nan", "factual"), ("007", "None", "1.50", "hallucinated")]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps({key: [record[key] for record in RECORDS] for key in RECORDS[0]})),
        ("a.json", json.dumps({key: {str(i): r[key] for i, r in enumerate(RECORDS)} for key in RECORDS[0]})),
        ("a.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(record) for record in RECORDS)),
        ("a.JSON", "\n".join(json.dumps(record) for record in RECORDS)),
    ],
)
def test_json_of_every_orientation(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows = read_rows(tmp_path / name)
    assert texts(rows) == READ
    assert [row.number for row in rows] == ([1, 3] if name == "a.jsonl" else [1, 2])


def test_numbers_and_null_of_json_are_text(tmp_path):
    cells = {"id": 12345678901234567890, "clinical_note": 38.50, "model_summary": True, "label": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(cells).replace("38.5", "38.50") + '\n{"id": NaN, "x": 1}\n')
    (_, first, _), (_, second, _) = read_table(tmp_path / "a.jsonl", ("clinical_note",))
    assert first == {
        "id": "12345678901234567890",
        "clinical_note": "38.50",
        "model_summary": "True",
        "label": "",
        "x": "",
    }
    assert (second["id"], second["clinical_note"], second["x"]) == ("", "", "1")


def test_of_two_texts_under_one_key_none_is_chosen(tmp_path):
    for name, content, place in (
        ("a.jsonl", '{"clinical_note": "a"}\n\n{"id": 1, "clinical_note": "Zebra", "id": 2}\n', "row 3"),
        ("a.json", '[{"clinical_note": "Zebra", "clinical_note": "Zebra again"}]', "row 1"),
        ("a.json", '[{"clinical_note": "a"}, {"x": {"y": 1, "y": 2}}]', "row 2"),
        ("a.json", '{"clinical_note": ["a"], "clinical_note": ["Zebra"]}', "the object"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"{place} has the same key twice\nkeep one") as refused:
            list(read_table(tmp_path / name, ("clinical_note",)))
        assert "Zebra" not in str(refused.value)


def test_a_data_frame(csv_files):
    import pandas as pd

    frame = pd.DataFrame(RECORDS)
    frame.loc[2] = [None, float("nan"), pd.NA, None]
    assert texts(read_rows(frame)) == READ
    notes = pd.DataFrame(
        {"text": [note for note, _ in NOTES], "summary": [summary for _, summary in NOTES], "n": 3.0}
    )
    train, validation = create_sft_dataloaders(
        notes,
        None,
        tiny_tokenizer(),
        note_column="text",
        summary_column="summary",
        label="factual",
        val_fraction=0.2,
    )
    assert (len(train.dataset), len(validation.dataset)) == (9, 2)
    with pytest.raises(InputError, match="unknown options: max_lenght"):
        create_sft_dataloaders(notes, notes, tiny_tokenizer(), max_lenght=8)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | st.recursive(st.none() | st.integers(), st.lists, max_leaves=9).map(json.dumps))
def test_any_json_file_gives_rows_or_a_refusal(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content.encode("utf-8", "replace"))
    with pytest.raises(InputError) as error:
        list(read_table(path, ("clinical_note",)))
    assert str(error.value).count("\n") <= 1


@pytest.mark.parametrize(
    "name, content, words",
    [
        pytest.param("a.json", "[" * 100_000, "not a JSON table", id="deep"),
        ("a.jsonl", '{"clinical_note": "SECRET"}\n{"clinical_note": SECRET}', "line 2 is not a JSON object"),
        ("a.json", "id,clinical_note\n1,SECRET\n", "if it is a CSV, name it .csv"),
        ("a.csv", '[{"clinical_note": "SECRET", "label": "factual"}]', "this is JSON, not a CSV"),
        ("a.json", '[{"clinical_note": ["SECRET"]}]', "row 1: column clinical_note holds a list"),
        ("a.json", '[\n{"clinical_note": "SECRET"},\n]', "not a JSON table: line 3: "),
        ("a.json", '{"clinical_note": ["a"],\n"id": [1\n}', "not a JSON table: line 3: "),
        ("a.jsonl", '[\n{"clinical_note": "SECRET"\n{"id": 1}]', "not a JSON table: line 3: "),
        ("a.jsonl", '{"clinical_note": "a"}\n5\n{"clinical_note": "a"}', "line 2 is not a JSON object"),
        ("a.json", "[]", "no column clinical_note"),
        (
            "a.json",
            '{"data": [{"clinical_note": "SECRET"}]}',
            "the rows are under data, not columns of text\n",
        ),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "SECRET"}]}', "the rows are under messages"),
        ("a.csv", "{\\rtf1 SECRET}", "this is RTF, not a CSV"),
        ("a.csv", "<html><body>SECRET</body></html>", "this is HTML, not a CSV"),
        ("a.xml", "<notes><note>SECRET</note></notes>", "this is XML, not a CSV"),
        ("a.csv", "%PDF-1.4 SECRET", "a PDF, not a text file"),
        ("a.csv", "PAR1\0SECRET", "a Parquet file, not a text file"),
    ],
)
def test_wrong_formats_are_called_by_their_names(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        list(read_table(tmp_path / name, ("clinical_note",)))
    assert words in str(error.value)
    assert "SECRET" not in str(error.value)


# ------------------------------------------------------------------------------- columns and labels


def test_an_option_names_a_column(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("9", "Other", "Fever.")], ["Row-ID", "clinical_note", "The Text"])
    columns = {"id": "row_id", "clinical_note": "the text", "model_summary": None}
    ((_, cells, _),) = read_table(path, ("clinical_note",), columns=columns)
    assert cells == {"id": "9", "clinical_note": "Fever.", "other_clinical_note": "Other"}
    with pytest.raises(InputError, match="no column is called what --note_column says"):
        list(read_table(path, ("clinical_note",), columns={"clinical_note": "x"}))


def test_two_options_cannot_name_one_column(tmp_path):
    """One of them would be forgotten."""
    path = write_csv(tmp_path / "a.csv", [("Fever.", "x")], ["Text", "other"])
    for ours, words in (("id", "--id_column"), ("model_summary", "--summary_column")):
        names = {ours: "text", "clinical_note": " TEXT"}
        with pytest.raises(InputError, match=f"{words} and --note_column name the same column"):
            list(read_table(path, ("clinical_note",), columns=names))


def test_one_label_has_one_meaning(csv_files):
    with pytest.raises(InputError, match="gives one label two meanings"):
        read_rows(csv_files[0], DataOptions(label_map="Y=hallucinated,y=factual"))
    assert read_rows(csv_files[0], DataOptions(label_map="Y=factual,y=factual"))


@pytest.mark.parametrize("last", ["", "x"])
@pytest.mark.parametrize("numbers", [(1, 2, 3), (4, 70, 71)])
def test_row_names_without_a_header_are_refused(tmp_path, last, numbers):
    """As R writes them: each cell would be taken for that of the next column."""
    path = tmp_path / "a.csv"
    rows = "".join(f'"{number}","p","A note.","{last}"\n' for number in numbers)
    path.write_text(f'"id","clinical_note","ward"\n{rows}')
    with pytest.raises(InputError, match=r"row names\?\)\n.*row\.names=FALSE"):
        list(read_table(path, ("clinical_note",)))
    # A separator at the end of rows is none
    path.write_text(f"id,clinical_note\nx{numbers[0]},Fever.,\nx{numbers[1]},Cough.,\n")
    assert [cells["clinical_note"] for _, cells, _ in read_table(path, ("clinical_note",))] == [
        "Fever.",
        "Cough.",
    ]


@pytest.mark.parametrize("second", ['\ufeff"id","clinical_note","ward"', "ID, Clinical_Note ,Ward"])
def test_a_second_header_is_no_patient(tmp_path, second):
    path = tmp_path / "a.csv"
    path.write_text(f"id,clinical_note,ward\n1,Fever.,A\n{second}\n2,Cough.,B\n", encoding="utf-8-sig")
    rows = list(read_table(path, ("clinical_note",)))
    assert [(number, cells["id"]) for number, cells, _ in rows] == [(2, "1"), (4, "2")]


@pytest.mark.parametrize("second", ["id,ward,clinical_note", "clinical_note,id", "note_id,clinical_note,bed"])
def test_a_header_unlike_the_first_is_refused(tmp_path, second):
    path = tmp_path / "a.csv"
    path.write_text(f"id,clinical_note,ward\n1,Fever.,A\n{second}\n2,B,Cough.\n")
    with pytest.raises(InputError, match="row 3: a second header, unlike the first"):
        list(read_table(path, ("clinical_note",)))


def test_a_tsv_of_one_column_has_no_other_separators(tmp_path):
    (tmp_path / "a.tsv").write_text("clinical_note\nFever, cough; rash.\n")
    ((_, cells, problem),) = read_table(tmp_path / "a.tsv", ("clinical_note",))
    assert (cells, problem) == ({"clinical_note": "Fever, cough; rash."}, "")


def test_unpaired_surrogates_of_json_become_visible(tmp_path):
    """They cannot be written as UTF-8."""
    (tmp_path / "a.jsonl").write_text(r'{"id": "\ud800x", "clinical_note": "a", "ward": "\udc00"}')
    ((_, cells, _),) = read_table(tmp_path / "a.jsonl", ("clinical_note",))
    assert cells == {"id": "\ufffdx", "clinical_note": "a", "ward": "\ufffd"}


NAMES = ("Fall-Nr", "Befund", "Kurzfassung")


@pytest.mark.parametrize(
    "kind, mark", [(".tsv", "\t"), (".csv", "\t"), (".csv", ";"), (".csv", "|"), (".csv", ",")]
)
def test_unknown_columns_are_named_whatever_parts_them(tmp_path, kind, mark):
    path = tmp_path / f"a{kind}"
    note = "SECRET, seen on Monday with fever. No cough; stable."
    cells = ["7", f'"{note}"', "SECRET"]
    path.write_text(f"{mark.join(NAMES)}\n{mark.join(cells)}\n")
    with pytest.raises(InputError, match=r"\(3 columns: fall_nr, befund, kurzfassung\)") as error:
        read_rows(path)
    assert "--note_column NAME --summary_column NAME" in error.value.fix
    assert "SECRET" not in str(error.value)
    options = DataOptions(note_column="Befund", summary_column="Kurzfassung", label="factual")
    assert read_rows(path, options)[0].clinical_note == note


@pytest.mark.parametrize(
    "header",
    [
        "SECRET,SECRET",
        "7,SECRET",
        f"SECRET,{'SECRET' * 6}",
        "SECRET has a fever today,b",
        ",".join("ABCDEFGHIJKLMN"),
    ],
)
def test_a_first_row_that_may_be_a_patients_is_not_shown(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\nx,{'SECRET ' * 9}\n")
    with pytest.raises(InputError, match="columns, known: none") as error:
        read_rows(tmp_path / "a.csv")
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("label_map", [None, "FACTUAL=factual,wrong=hallucinated"])
def test_an_unknown_label_among_known_ones(tmp_path, label_map):
    labels = ["factual"] * 5 + ["wrong" if label_map else "hallucinated"] * 2 + ["Unsure"]
    rows = [(i, f"SECRET note {i}", "SECRET", label, "") for i, label in enumerate(labels)]
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(
        InputError, match=r"1 problem: row 9 \(id 7\): label.*unknown labels: 1 unsure"
    ) as error:
        read_rows(path, DataOptions(label_map=label_map))
    # What it means is for the user to say
    advised = f"{label_map},unsure=?" if label_map else "unsure=?"
    assert f'--label_map "{advised}"' in error.value.fix
    with pytest.raises(InputError, match="does not map labels"):
        read_rows(path, DataOptions(label_map=advised))
    write_csv(path, [*rows, (9, "SECRET", "SECRET", " and SECRET", "factual")])
    with pytest.raises(InputError, match="1 unsure") as error:
        read_rows(path, DataOptions(label_map=label_map))
    assert "row 10 (id 9): label is neither factual nor hallucinated (a comma outside quotes?)" in str(
        error.value
    )
    assert "SECRET" not in str(error.value)


def test_a_label_for_all_is_not_put_over_the_files_own(tmp_path, capfd):
    """Hallucinated rows would be trained on."""
    labels = ["factual", "Hallucinated ", "factual"]
    rows = [(i, f"note {i}", f"summary {i}", label, "") for i, label in enumerate(labels)]
    path = write_csv(tmp_path / "a.csv", rows)
    words = "--label factual, but the file itself labels 1 row otherwise\nleave out --label"
    with pytest.raises(InputError, match=words):
        read_rows(path, DataOptions(label="factual"))
    for more in ({"label_column": "label"}, {"label_map": "a=factual"}):
        with pytest.raises(InputError, match="--label cannot be combined with --label_column or --label_map"):
            read_rows(path, DataOptions(label="factual", **more))
    # Misspellings of it, and unknown labels among known ones
    for others in (["factual", "wrong", ""], ["good", "halucinated", ""], ["", "non-factual", ""]):
        write_csv(path, [(*row[:3], label, "") for row, label in zip(rows, others)])
        with pytest.raises(InputError, match="but the file itself labels"):
            read_rows(path, DataOptions(label="factual"))
    # Labels of another kind, and none
    write_csv(path, [(*row[:3], label, "") for row, label in zip(rows, ["cardiology", "", "cardiology"])])
    assert [row.label for row in read_rows(path, DataOptions(label="factual"))] == ["factual"] * 3
    assert "2 labels (cardiology) not used: --label factual" in capfd.readouterr().err


def test_kinds_are_shown_only_if_they_can_be_no_texts():
    assert shown_kinds(["wrong number"] * 2 + ["b"] * 3) == ["b", "wrong number"]
    assert shown_kinds(["Fever.", "Cough."]) is None
    assert shown_kinds(["x" * 31] * 9) is None
    assert shown_kinds([str(i) for i in range(9)] * 2) is None


# ------------------------------------------------------------------------------- which rows validate


def test_nothing_is_validated_on_the_wrong_notes(csv_files):
    train, validation = map(str, csv_files)
    with pytest.raises(InputError, match="--train_csv without --val_csv"):
        read_data(DataOptions(train_csv=train))
    assert read_data(DataOptions(train_csv=train), validate=False)[1] == []
    with pytest.raises(InputError, match="--val_csv without --train_csv"):
        read_data(DataOptions(val_csv=validation), validate=False)
    with pytest.raises(InputError, match="cannot be combined"):
        read_data(DataOptions(train_csv=train, val_csv=validation, val_fraction=0.1))
    assert DataOptions().val_file == "phase1_data/sft/validation_set_processed.csv"


def test_several_files_are_read_as_one(csv_files):
    train, validation = map(str, csv_files)
    rows, _ = read_data(DataOptions(train_csv=[train, validation], val_csv=validation))
    assert len(rows) == 15
    assert {row.source for row in rows} == {"train.csv", "val.csv"}


def test_files_of_one_name_are_told_apart_by_their_folders(csv_files, tmp_path):
    copies = []
    for ward in "ab":
        (tmp_path / ward / "2031").mkdir(parents=True)
        copies.append(str(shutil.copy(csv_files[0], tmp_path / ward / "2031" / "train.csv")))
    rows, _ = read_data(DataOptions(train_csv=copies, val_csv=str(csv_files[1])))
    assert {row.source for row in rows} == {"a/2031/train.csv", "b/2031/train.csv"}


def test_a_fraction_of_the_notes_is_set_apart(tmp_path):
    notes = [f"Patient {i} on ward {i * 7}: " + " ".join(f"w{i}x{j}" for j in range(40)) for i in range(40)]
    rows = [(f"r{i}", note, "Fever.", "factual", "") for i, note in enumerate(notes)]
    rows += [(f"h{i}", note, "Cough.", "hallucinated", "") for i, note in enumerate(notes)]
    rows += [
        (f"c{i}", f"Seen on 3/{i}/2021. {note}", "Fever.", "factual", "") for i, note in enumerate(notes)
    ]
    options = DataOptions(train_csv=str(write_csv(tmp_path / "a.csv", rows)), val_fraction=0.2)
    train, validation = read_data(options)
    assert len([row for row in validation if row.label == "factual"]) == 16
    # A note, its hallucinated summary and its near-copy stay together
    assert {row.id[1:] for row in train}.isdisjoint(row.id[1:] for row in validation)
    assert read_data(options)[1] == validation
    write_csv(tmp_path / "a.csv", rows[::-1])
    assert {row.id for row in read_data(options)[1]} == {row.id for row in validation}
    options.seed = 7
    assert {row.id for row in read_data(options)[1]} != {row.id for row in validation}
    write_csv(tmp_path / "a.csv", rows[:1])
    with pytest.raises(InputError, match="cannot be parted"):
        read_data(options)
