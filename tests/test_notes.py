"""Notes from files: ids, columns, what one note is."""

import json
import os
import re

import pytest
from conftest import SHARED_DATA
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import NOTES, write_csv

from sft.cli import InputError
from sft.data.table import column_name
from sft.inference.notes import ID_LIKE, notes_digest, read_notes, split_text
from sft.inference.suspicion import suspicion
from sft.options import InferenceConfig


def json_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([3.0, 4.0, None], ["3", "4", None]),
        (["3.0", "4.0", ""], ["3", "4", None]),
        (["3.0", "A1", ""], ["3", "A1", None]),
        (["1.0", "1.5", ""], ["1.0", "1.5", None]),
        ([float("nan"), 3.5, "\u200b"], [None, "3.5", None]),
        ([-7, 0, "-8.0"], ["-7", "0", "-8"]),
    ],
)
def test_ids_given_and_missing_never_mix(tmp_path, capsys, ids, expected):
    path = json_lines(tmp_path / "a.jsonl", *({"id": i, "clinical_note": "x"} for i in ids))
    notes = read_notes(path)
    assert [note.id for note in notes] == expected
    assert [note.row for note in notes] == [1, 2, 3]
    if None in expected:
        assert "without an id (row" in capsys.readouterr().err


@given(st.lists(st.text("0123456789abcdefABCDEF", min_size=1, max_size=12), min_size=1))
@example(["12345e67", "1E5", "12e34"])
def test_hexadecimal_ids_stay(tmp_path_factory, ids):
    path = write_csv(
        tmp_path_factory.mktemp("hex") / "a.csv", [(i, "x") for i in ids], ["id", "clinical_note"]
    )
    assert [note.id for note in read_notes(path)] == ids


def test_ids_that_are_the_same_once_written_as_numbers(tmp_path, capsys):
    path = json_lines(tmp_path / "a.jsonl", *({"id": i, "clinical_note": "x"} for i in ("3.0", "3", "A1")))
    assert [note.id for note in read_notes(path)] == ["3", "3", "A1"]
    logged = capsys.readouterr().err
    assert "1 id like 3.0: written as 3" in logged
    assert "1 id on more than one row (3)" in logged


@pytest.mark.parametrize(
    "name",
    [
        "fin",
        "csn",
        "identifier",
        "study_uid",
        "case_no",
        "note_nr",
        "patientnumber",
        "Note Number",
        "accession",
        "HADM_ID",
        "Sample No.",
    ],
)
def test_columns_that_may_be_ids(name):
    assert ID_LIKE.fullmatch(column_name(name))
    assert not any(map(ID_LIKE.fullmatch, ("ward_number", "phone_no", "diagnosis", "casenote", "keyword")))


@pytest.mark.parametrize("bad", [[1], {"a": 1}, True, 1e30])
def test_ids_that_are_no_ids_are_refused(tmp_path, bad):
    path = json_lines(tmp_path / "a.jsonl", {"id": bad, "clinical_note": "x"})
    with pytest.raises(InputError, match=r"row 1: (the id|column id)"):
        read_notes(path)


def test_names_that_are_no_utf8_stay_apart(tmp_path):
    for name in (b"M\xfcller.txt", b"M\xf6ller.txt"):
        (tmp_path / os.fsdecode(name)).write_text("No fever.")
    assert sorted(note.id for note in read_notes(tmp_path)) == ["M\\xf6ller", "M\\xfcller"]


def test_repeated_ids_and_other_id_columns_are_named(tmp_path, capsys):
    path = write_csv(
        tmp_path / "a.csv", [(7, 1, "x"), (7, 2, "y")], header=["Note-ID", "other", "clinical_note"]
    )
    assert [note.id for note in read_notes(path)] == [None, None]
    assert "add --id_column note_id" in capsys.readouterr().err
    notes = read_notes(path, InferenceConfig(id_column="Note-ID", keep_columns=["other"]))
    assert [(note.id, note.row, note.kept) for note in notes] == [
        ("7", 2, {"other": "1"}),
        ("7", 3, {"other": "2"}),
    ]
    assert '1 id on more than one row (7): "row" tells them apart' in capsys.readouterr().err
    assert notes_digest(notes) != notes_digest(read_notes(path))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"id_column": "nowhere"}, "no column is called what --id_column says"),
        ({"keep_columns": ["nowhere"]}, "no column nowhere"),
        ({"keep_columns": ["row"]}, "has a column of this name"),
        ({"note_column": "text"}, "no column is called what --note_column says"),
        ({"one_note": "file"}, "one note per row"),
    ],
)
def test_columns_that_are_not_there(tmp_path, options, words):
    path = json_lines(tmp_path / "a.jsonl", {"id": 1, "clinical_note": "a", "x": 5})
    with pytest.raises(InputError, match=words):
        read_notes(path, InferenceConfig(**options))


def test_of_two_columns_of_one_name_none_is_kept(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,Ward,clinical_note,ward,bed\n1,A,Fever.,B,9\n")
    assert read_notes(path, InferenceConfig(keep_columns=["bed"]))[0].kept == {"bed": "9"}
    with pytest.raises(InputError, match="no column ward, or more than one\ncheck --keep_columns"):
        read_notes(path, InferenceConfig(keep_columns=["ward"]))


def test_odd_json(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in ("[" * 100_000, '{"clinical_note": ' * 100_000, "5", '{"clinical_note": "\0"}'):
        path.write_text(f'{{"clinical_note": "x"}}\n{line}\n')
        with pytest.raises(InputError, match="line 2 is not a JSON object"):
            read_notes(path)
    path.write_text('{"clinical_note": NaN, "k": Infinity}\n')
    assert read_notes(path, InferenceConfig(keep_columns=["k"]))[0][2:] == ("", {"k": ""})


def test_bad_rows_of_input_files(tmp_path):
    # A record without a note fails alone
    (tmp_path / "a.jsonl").write_text('{"clinical_note": "ok"}\n{"text": 1}\n')
    assert [note.text for note in read_notes(tmp_path / "a.jsonl")] == ["ok", ""]
    write_csv(tmp_path / "a.csv", [(1,)], header=["text"])
    with pytest.raises(InputError, match=r"must name clinical_note .*; or use --note_column text"):
        read_notes(tmp_path / "a.csv")


def test_rows_with_more_fields_than_columns_are_refused(tmp_path):
    """An unquoted comma would leave the summary of half a note."""
    (tmp_path / "a.csv").write_text(
        "id,clinical_note\n11,no fever\n12,fever, cough\n13,well,\nJo Doe,pain, severe\n"
    )
    with pytest.raises(
        InputError, match=r"more fields .*: row 3 \(id 12\), row 5 \(id \(not shown\)\)"
    ) as refused:
        read_notes(tmp_path / "a.csv")
    assert not any(word in str(refused.value) for word in ("fever", "cough", "Doe", "pain"))


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_any_line_ends(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(["Fever.", "", "Cough.", ""]).encode())
    notes = [(note.row, note.id, note.text.strip()) for note in read_notes(tmp_path / "a.txt")]
    assert notes == [(1, None, "Fever."), (3, None, "Cough.")]


# ------------------------------------------------------------------------------- what one note is


def test_a_note_is_a_line_a_paragraph_or_a_file(capsys):
    text = "\nOne.\nTwo.\n\n\nThree.\n"
    assert split_text("x", text, "line", "line") == [(2, "One.\n"), (3, "Two.\n"), (6, "Three.\n")]
    assert split_text("x", text, "paragraph", "line") == [(2, "One.\nTwo.\n"), (6, "Three.\n")]
    assert split_text("x", text, "file", "line") == [(2, "One.\nTwo.\n\n\nThree.\n")]
    assert capsys.readouterr().err == ""
    assert split_text("x", text, "auto", "line") == split_text("x", text, "line", "line")
    assert capsys.readouterr().err == "x: 3 notes, one a line; --one_note file if it is one note\n"
    assert split_text("x", "\n \n", "file", "line") == []


@given(st.text())
def test_no_text_is_lost(text):
    for one_note in ("line", "paragraph", "file"):
        kept = "".join(unit for _, unit in split_text("x", text, one_note, "line"))
        assert "".join(kept.split()) == "".join(text.split())


def test_several_files_are_one_note_each(tmp_path, capsys):
    for name in ("b.txt", "a.txt", "c.TXT", "readme.md"):
        (tmp_path / name).write_text(f"Dear colleague,\nabout {name}\n")
    notes = read_notes(tmp_path)
    assert [(note.row, note.id) for note in notes] == [(1, "a"), (2, "b"), (3, "c")]
    assert "1 file without the extension .txt left out" in capsys.readouterr().err
    assert read_notes([tmp_path / "b.txt", tmp_path / "a.txt"])[0].text == "Dear colleague,\nabout b.txt\n"
    with pytest.raises(InputError, match=r"readme\.md: not \.txt"):
        read_notes([tmp_path / "b.txt", tmp_path / "readme.md"])
    with pytest.raises(InputError, match="looks like notes"):
        read_notes(tmp_path / "a.txt")
    assert [note.id for note in read_notes(tmp_path / "a.txt", InferenceConfig(one_note="file"))] == ["a"]


def test_a_note_in_the_wrong_option_is_not_shown():
    with pytest.raises(InputError) as refused:
        read_notes("Patient John has fever and cough")
    assert "John" not in str(refused.value)


LETTERS = {
    "wrapped": "The patient denies chest pain and has no\nfever. Penicillin allergy: rash.",
    "headings": "Discharge Letter\n\nDIAGNOSES:\nPneumonia.\n\nPLAN:\nRest.",
    "list": "Medications on leaving.\n1. Aspirin\n2. Metformin\n3. Bisoprolol",
    "dialogue": "Doctor: How are you?\nPatient: Better.\nDoctor: Good.\nPatient: Thanks.",
    "sections": "AF clinic. 69F.\nPicked up at a pulse check.\nPMH: T2DM, HTN.\nO/E irreg 94/min.",
    "greeting": "Dear Dr Patel,\nThank you for seeing this lady.\nHer cough has gone.\nYours sincerely,\nA. Brown",
    "cut off": "The patient denies chest pain and has\nFever. Penicillin allergy: rash.",
    "bullets": "- 44F, day 2 after appendectomy\n- Pain 3/10, eating\n- Home tomorrow",
    "times": "08:30 Found on the floor by her carer.\n08:55 Ambulance arrived.\n09:40 Given morphine.",
    "one subject": "Mr. Hill is 70 years old and fell.\nHe has pain in his hip.\nHe cannot stand.\nNo fever.",
    "dates": "03/02/2021 Seen with a cough, better now.\n10/02/2021 Cough gone.\n1 May 2021 Well.",
    "doses": "Medication on leaving, unchanged.\nAspirin 75 mg in the morning\nMetformin 500mg twice a day",
    "French": "Chère collègue,\nJe vous adresse cette patiente de 70 ans.\nElle tousse beaucoup.",
    "short lines": "72M chest pain 2h\nKnown HTN\nBP 150/90\nECG normal\nTrop pending\nAspirin given",
}


@pytest.mark.parametrize("name", LETTERS)
def test_a_letter_is_not_taken_apart(name):
    with pytest.raises(InputError, match="looks like notes of several lines") as refused:
        split_text(name, LETTERS[name], "auto", "line")
    assert "--one_note" in refused.value.fix
    assert not any(word in str(refused.value) for word in ("fever", "Pneumonia", "Aspirin", "Better", "T2DM"))


def test_notes_of_one_line_raise_no_suspicion():
    notes = [" ".join(note.split()) for note, _ in NOTES]
    others = ["pt c/o cough", "fall, hip pain", "no fever today", "SOB", "chest pain 2/7"]
    dialogues = [f"{a}: How is it? {b}: Fine." for a, b in ("AB", "BA", "AB", "BA")]
    for units in (
        notes,
        others,
        dialogues,
        ["1. Fever.", "2. Cough."],
        ["FEVER", "COUGH"],
        ["3/2/2021 45M with cough.", "4/2/2021 Lady of 80, fell.", "5/2/2021 Mr Hill has a rash."],
        ["Plan: rest.", "Plan: go."],
    ):
        assert suspicion(units) == ""


def as_sentences(note: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", " ".join(note.split()))


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}")
def test_real_notes_are_told_from_their_parts():
    """Files of one note a line, of 3 to 100 notes, are read; whole notes are not taken apart."""
    for path in sorted(SHARED_DATA.glob("*/*.csv")):
        notes = [note.text.strip() for note in read_notes(path)]
        flat = [" ".join(note.split()) for note in notes]
        for size in (3, 10, 100):
            assert not any(suspicion(flat[start : start + size]) for start in range(0, len(flat), size))
        letters = [[line for line in note.split("\n") if line.strip()] for note in notes if "\n" in note]
        assert sum(bool(suspicion(lines)) for lines in letters) >= 0.98 * len(letters)
    long = [as_sentences(note.text) for note in read_notes(SHARED_DATA / "aci_bench" / "notes.csv")]
    assert sum(bool(suspicion(lines)) for lines in long) >= 0.8 * len(long)


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".json", ".jsonl"])
def test_tables_of_every_kind(tmp_path, kind):
    rows = [{"hadm_id": "A3", "TEXT": "Fever.", "ward": "NA"}, {"hadm_id": "", "TEXT": "Cough.", "ward": "2"}]
    path = tmp_path / f"a{kind}"
    mark = {".csv": ";", ".tsv": "\t"}.get(kind)
    if mark:
        path.write_text("\n".join(mark.join(cells) for cells in (rows[0], *(row.values() for row in rows))))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        json_lines(path, *rows)
    notes = read_notes(path, InferenceConfig(id_column="hadm_id", note_column="TEXT", keep_columns=["ward"]))
    assert [(note.id, note.text, dict(note.kept)) for note in notes] == [
        ("A3", "Fever.", {"ward": "NA"}),
        (None, "Cough.", {"ward": "2"}),
    ]
