"""Rows of real exports: repaired and counted, or refused by row and id."""

import csv
import dataclasses
import gzip
import io

import pytest
from conftest import assert_input_error, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HEADER, NOTES, rows_of, write_csv

from sft.cli import InputError
from sft.data.rows import Row, factual_rows, leaked_rows, name_rows, read_rows, repeated_rows
from sft.data.text import clean_text, is_blank
from sft.inference.notes import read_notes

HEADER_LINE = "id,clinical_note,model_summary,label,hallucination_type\n"


def test_values_are_unchanged_text(tmp_path):
    note = 'NA 128, "low";\r\nnext line, =SUM(A1) null'
    path = write_csv(
        tmp_path / "a.csv",
        [("1", note, "NA", " Factual ", ""), ("2", "None", "null", "hallucinated", "wrong_number")],
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    first, second = read_rows(path)
    assert first == Row(2, "1", note.replace("\r\n", "\n"), "NA", "factual", "")
    assert second == Row(3, "2", "None", "null", "hallucinated", "wrong_number")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["empty"]),
        (b"id,clinical_note,label\n1,a,factual\n", ["model_summary", "header"]),
        (HEADER_LINE.encode(), ["no rows"]),
        (
            HEADER_LINE.encode() + b"7,SECRET note,SECRET summary,hallucinated,x\n",
            ["no row is labeled factual (1 row)"],
        ),
        (HEADER_LINE.encode() + b"7,SECRET note,  ,factual,\n", ["row 2", "id 7", "model_summary is empty"]),
        (
            HEADER_LINE.encode() + b"7,,SECRET,factual,\n\n8,SECRET,SECRET,true,\n",
            ["row 2", "clinical_note is empty", "row 4", "id 8", "label"],
        ),
        (HEADER_LINE.encode() + b"7,SECRET,SECRET,factual,,SECRET\n", ["row 2", "more fields"]),
        (HEADER_LINE.encode() + b'7,"SECRET,SECRET,factual,\n8,a,b,factual,\n', ["row 2", "line 2", "quote"]),
        (
            HEADER_LINE.encode()
            + "7,SECRET café,SECRET,factual,\n".encode()
            + b"8,SECRET caf\xe9,SECRET,factual,\n",
            ["UTF-8", "line 3"],
        ),
        (
            b"id,clinical_note,clinical_note,model_summary,label\n1,a,b,c,factual\n",
            ["more than once in the header: clinical_note"],
        ),
        (None, ["no such file"]),
    ],
)
@pytest.mark.parametrize("script", ["stage_a_sft_training.py", "sft_dataset.py"])
def test_bad_files_are_refused_in_two_lines(tmp_path, content, words, script):
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    arguments = ["--output_dir", tmp_path / "out"] if script.startswith("stage") else []
    result = run_python(script, "--train_csv", path, *arguments)
    assert_input_error(result, "bad.csv", *words)
    assert "SECRET" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_text_in_the_id_column_is_not_shown(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("SECRET patient story", "note", "", "factual", "")])
    with pytest.raises(InputError) as error:
        read_rows(path)
    assert "SECRET" not in str(error.value)
    assert "row 2 (id (not shown))" in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1), st.text(min_size=1)).filter(
            lambda pair: not any(is_blank(clean_text(text)) for text in pair)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_csv_module_writes_is_what_is_read(tmp_path_factory, pairs):
    # No unpaired surrogates
    pairs = [tuple(text.encode("utf-8", "replace").decode() for text in pair) for pair in pairs]
    path = write_csv(
        tmp_path_factory.mktemp("csv") / "a.csv",
        [(i + 1, *pair, "factual", "") for i, pair in enumerate(pairs)],
    )
    assert [(row.clinical_note, row.model_summary) for row in read_rows(path)] == [
        tuple(map(clean_text, pair)) for pair in pairs
    ]


# ------------------------------------------------------------------------------- repaired

GOOD = [
    ("1", "Température 38,5 °C; toux.", "Fièvre.", "factual", ""),
    ("2", 'A\tB, "x"\nC', "B – c 😀", "hallucinated", "wrong_number"),
]
READ = [
    Row(2, "1", "Température 38,5 °C; toux.", "Fièvre.", "factual", ""),
    Row(3, "2", 'A\tB, "x"\nC', "B – c 😀", "hallucinated", "wrong_number"),
]


def table(rows=GOOD, header=HEADER, **dialect) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, **dialect).writerows([header, *rows])
    return buffer.getvalue()


def read(tmp_path, content: str | bytes) -> list[Row]:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_rows(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_every_common_form_reads_the_same(tmp_path, capfd, encoding, delimiter, line_end, quoting):
    assert (
        read(tmp_path, table(delimiter=delimiter, lineterminator=line_end, quoting=quoting).encode(encoding))
        == READ
    )
    logged = capfd.readouterr().err
    if encoding.startswith("utf-8"):
        assert logged == ""
    else:
        assert logged.count("\n") == 1
        assert f"read as {encoding[:6].upper()}" in logged


def test_columns_in_any_order_case_and_number(tmp_path, capfd):
    header = ["Extra", " LABEL", "Model Summary", "extra", "\u200bClinical-Note ", "ID", ""]
    rows = [("x", row[3], row[2], "y", row[1], row[0], "") for row in GOOD]
    assert read(tmp_path, table(rows, header)) == [
        Row(row.number, row.id, row.clinical_note, row.model_summary, row.label) for row in READ
    ]
    assert capfd.readouterr().err == ""


def test_windows_1252_is_read_and_counted(tmp_path, capfd):
    rows = [GOOD[0], ("2", "Müller’s café – stable", "Stable", "factual", "")]
    assert read(tmp_path, table(rows).encode("windows-1252"))[1].clinical_note == "Müller’s café – stable"
    count = sum(ord(character) > 127 for character in table(rows))
    assert f"a.csv: {count} non-UTF-8 characters read as Windows-1252" in capfd.readouterr().err


def test_another_code_page_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not UTF-8: byte 0x.. on line 2"):
        read(tmp_path, table([("1", "Пациент", "ok", "factual", "")]).encode("cp1251"))


def test_repairs_are_counted_in_one_line_per_kind(tmp_path, capfd):
    text = (
        table(
            [
                ("1", "a\0b\x07", "x", "Factual ", ""),
                ("2", "c", "y", "FACTUAL", ""),
                ("3", "d", "z", "factual\u200b", ""),
            ]
        )
        + "\r\n,,,,\r\n"
    )
    text += "\ufeff" + table([("4", "e\x0cf", "v", "hallucination", "")])
    rows = read(tmp_path, text)
    assert [(row.number, row.clinical_note, row.label) for row in rows] == [
        (2, "ab", "factual"),
        (3, "c", "factual"),
        (4, "d", "factual"),
        (8, "e\nf", "hallucinated"),
    ]
    logged = [line.split("a.csv: ")[1] for line in capfd.readouterr().err.splitlines()]
    assert sorted(logged) == [
        "1 repeated header row skipped",
        "2 blank rows skipped",
        "2 control characters (NUL and the like) dropped",
        "4 labels in a different spelling, read as factual or hallucinated",
    ]


def test_excels_separator_line(tmp_path):
    rows = read(tmp_path, "sep=;\r\n" + table(delimiter=";"))
    assert [row.clinical_note for row in rows] == [row.clinical_note for row in READ]


def test_texts_that_only_look_wrong_are_kept(tmp_path, capfd):
    notes = [
        "NA",
        "null",
        "None",
        "=SUM(A1:A3)",
        "-",
        "\u200fימין\u200e left",
        "👩\u200d⚕️ seen",
        "nan",
        '5" wound',
    ]
    rows = read(tmp_path, table([(str(i), note, note, "factual", "") for i, note in enumerate(notes)]))
    assert [row.clinical_note for row in rows] == notes
    assert [row.model_summary for row in rows] == notes
    assert capfd.readouterr().err == ""


def test_a_10_mb_cell(tmp_path):
    note = "Fever, cough. " * 750_000
    assert read(tmp_path, table([("1", note, "Fever.", "factual", "")]))[0].clinical_note == note.strip()


# ------------------------------------------------------------------------------- refused


def quotes_swallow(position: int) -> str:
    rows = [(str(i), f"SECRET note {i}, stable", "SECRET", "factual", "") for i in range(2, 40)]
    lines = table(rows, lineterminator="\n").splitlines(keepends=True)
    lines[position] = lines[position].replace('stable"', "stable")  # never closed
    return "".join(lines)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"PK\x03\x04SECRET", ["Excel workbook", "CSV UTF-8"]),
        (b"\xd0\xcf\x11\xe0SECRET", ["Excel workbook"]),
        (gzip.compress(b"SECRET", mtime=0), ["gzip", "unpack"]),
        (bytes(range(256)) * 9, ["binary"]),
        (b"\0" * 999, ["empty", "add a header row: clinical_note, model_summary, label (id, hall"]),
        (b" \n \n", ["empty"]),
        (table(GOOD).encode("utf-16")[:-1], ["UTF-16"]),
        (
            "SECRET,note\n",
            [
                "no column clinical_note, model_summary, label",
                "2 columns, known: note",
                "--note_column note --summary_column NAME --label factual",
            ],
        ),
        (
            "1,SECRET,SECRET,label,\n",
            ["no column clinical_note, model_summary in", "5 columns, known: label"],
        ),
        (
            table(header=["ID", "id", "clinical_note", "model_summary", "label"]),
            ["more than once in the header: id"],
        ),
        (
            table([("7", "SECRET", "SECRET", "non-factual", "")]),
            ["no row has a known label; found 1 kind: not shown"],
        ),
        (table([*GOOD, ("7", "SECRET", "SECRET", "non-factual", "")]), ["row 4 (id 7)", "label"]),
        (table([("\u200b", "SECRET", "", "factual", "")]), ["row 2: model_summary is empty"]),
        (table([("7", " \u200b\t", "SECRET\0", "factual", "")]), ["row 2 (id 7)", "clinical_note is empty"]),
        (table([*GOOD, ("7", "SECRET", "SECRET")]), ["row 4 (id 7)", "label"]),
        (
            table([(str(i), "SECRET", "", "factual", "") for i in range(9)]),
            ["9 problems", "row 2 (id 0)", "row 6 (id 4): model_summary is empty; and 4 more"],
        ),
        (quotes_swallow(1), ["row 2,", "line 2", "quotes"]),
        (quotes_swallow(20), ["row 21,", "line 21", "quotes"]),
        (quotes_swallow(38), ["row 39,", "line 39", "quotes"]),
        (
            'id,clinical_note,model_summary,label\n7,"SECRET\n8,SECRET,SECRET,factual\n9,SECRET",SECRET,factual\n',
            ["row 2 (id 7)", "contains other rows"],
        ),
    ],
)
def test_what_cannot_be_repaired_is_refused_by_row_and_id(tmp_path, capfd, content, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    shown = str(error.value) + capfd.readouterr().err
    assert all(word in shown for word in ["a.csv", *words]), shown
    assert "SECRET" not in shown
    assert shown.count("\n") <= 1


def test_a_folder_is_not_a_csv(tmp_path):
    with pytest.raises(InputError, match="a folder, not a file"):
        read_rows(tmp_path)


# ------------------------------------------------------------------------------- anything at all

MARKER = "SECRETNOTE"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "windows-1252"]),
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.binary(max_size=4) | st.sampled_from([b'"', b",", b"\n", b"\0", b";", b"factual"]),
            st.integers(0, 9),
        ),
        max_size=6,
    ),
)
def test_any_file_gives_rows_or_a_refusal(tmp_path_factory, encoding, changes):
    rows = [
        (i, f"{MARKER} {note}", f"{MARKER} {summary}", "factual", "")
        for i, (note, summary) in enumerate(NOTES[:4])
    ]
    data = table(rows).encode(encoding)
    for place, inserted, n_cut in changes:
        position = int(place * len(data))
        data = data[:position] + inserted + data[position + n_cut :]
    path = tmp_path_factory.mktemp("any") / "a.csv"
    path.write_bytes(data)
    for reader in (read_rows, lambda path: read_notes(path)):
        try:
            reader(path)
        except InputError as error:
            assert str(error).count("\n") <= 1
            assert MARKER not in str(error)


# ------------------------------------------------------------------------------- sets of rows


def test_leaked_rows():
    train = rows_of([("A  note\nhere", "x"), ("B", "y"), ("b", "Y")])
    ((row, twin, share),) = leaked_rows(train, rows_of([("new", "x"), ("a NOTE here", "z")]))
    assert (row.id, twin.id, share) == ("r1", "r0", 1.0)


def test_repeated_rows():
    rows = rows_of([("A  note\nhere", "x"), ("B", "y"), ("b", "Y")])
    assert repeated_rows(rows) == {"the note and summary of an earlier row": [rows[2]]}
    other = Row(9, "r0", "other", "text", "factual")
    assert repeated_rows([*rows[:2], other]) == {"the id of an earlier row with another note": [other]}
    # Two files may count their rows alike
    assert not repeated_rows([rows[0], dataclasses.replace(other, source="b.csv")])
    # Several summaries of one note
    assert not repeated_rows([rows[0], Row(9, "r0", rows[0].clinical_note, "another", "factual")])


def test_ids_and_row_numbers_are_told_apart():
    assert name_rows(["7"]) == "id 7"
    assert name_rows(["row 2", "row 5"]) == "rows 2, 5"
    assert name_rows(["7", "row 2", "9"]) == "ids 7, row 2, 9"


@pytest.mark.parametrize("kind", [".csv", ".jsonl", "frame"])
def test_rows_without_an_id_are_counted_and_called_by_number(tmp_path, capfd, kind):
    import pandas as pd

    frame = pd.DataFrame({"id": ["a", None, None], "clinical_note": ["x", "y", "z"]})
    frame = frame.assign(model_summary="x", label="factual")
    path = tmp_path / f"a{kind}"
    if kind == ".csv":
        frame.to_csv(path, index=False)
    elif kind == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    rows = read_rows(frame if kind == "frame" else path)
    first = 3 if kind == ".csv" else 2
    assert [row.name for row in rows] == ["a", f"row {first}", f"row {first + 1}"]
    assert capfd.readouterr().err.endswith(": 2 rows without an id, called by row number\n")


def test_factual_rows():
    rows = [Row(2, "a", "Note", "right", "factual"), Row(3, "b", "Note", "wrong", "hallucinated")]
    assert factual_rows(rows) == rows[:1]
