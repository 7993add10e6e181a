"""Rows of a CSV whose quotes are wrong are refused; tables and lists within notes are not."""

import pytest
from tiny import write_csv

from sft.cli import InputError
from sft.data.rows import read_rows
from sft.data.table import read_table
from sft.inference.notes import read_notes
from sft.options import DataOptions, InferenceConfig

INCH = "Patient is 5'10\""


def problems(path) -> dict[int, str]:
    """{row number: problem}."""
    return {number: problem for number, _, problem in read_table(path, ["clinical_note"]) if problem}


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "rows",
    [
        # Two rows, and more
        ["id,clinical_note,ward", '1,"Fever and cough. No allergy.,A', f"2,{INCH},B", "3,Knee pain.,C"],
        [
            "id,clinical_note,ward",
            '1,"Fever and cough.,A',
            "2,Knee pain. Start warfarin 5 mg.,B",
            f"3,{INCH},C",
        ],
        # A note of two lines
        [
            "id,clinical_note,ward",
            'p1,"Fever.',
            "No allergy.,A",
            "p2,Knee pain.,B",
            f"p3,{INCH},C",
            "p4,Ear.,D",
        ],
        # The note last, first, and after two others
        ["id,clinical_note", '7,"Fever and cough', "8,Knee pain", f"9,{INCH}", "10,Ear pain"],
        ["clinical_note,model_summary", '"Fever and cough.,Flu.', f"{INCH},Tall.", "Ear pain.,Ear."],
        [
            "label,id,clinical_note,model_summary",
            'factual,1,"Fever.,Flu.',
            "factual,2,Knee.,Pain.",
            f"factual,3,{INCH},Tall.",
        ],
        # Closed in another column, and long ids in no order
        [
            "id,clinical_note,model_summary,ward",
            '71234,"Fever.,Flu.,A',
            f"10522,Knee pain.,{INCH},B",
            "3,Ear,Ear.,C",
        ],
    ],
)
def test_rows_that_an_unclosed_quote_merges(tmp_path, mark, rows):
    path = tmp_path / "a.csv"
    path.write_text("".join(row.replace(",", mark) + "\n" for row in rows))
    assert list(problems(path)) == [2]
    with pytest.raises(
        InputError, match=r"row 2.*a cell contains other rows|a cell contains other rows.*row 2"
    ):
        read_rows(path, DataOptions(label="factual")) if "summary" in rows[0] else read_notes(path)


PASTED = [
    "Labs:\nNa,138\nK,4.1",
    "Labs:\ntest,value,unit\nNa,138,mmol/L\nK,4.1,mmol/L\nReview in a week.",
    "Drugs:\n1,aspirin\n2,metformin\n3,ramipril",
    "Drugs:\nid,drug,dose\n1,aspirin,75 mg\n2,metformin,500 mg",
    "Operations:\n2019,Appendectomy\n2021,Fracture",
    "Kalium 4,5\n38,5 Temperatur",
    "Takes Aspirin,Metformin\nSeen 3,4 times\n2,000 mg a day",
    "Pressure:\n2024-01-02,120,80\n2024-01-03,125,85\nStable.",
    "Height 5'10\"\nFever,cough,rash\nBetter",
    "Kalium:\n3,5 mmol/l",
    "WBC\n12,300 and rising",
]


@pytest.mark.parametrize(
    "header",
    [
        "id clinical_note",
        "id clinical_note ward",
        "id clinical_note model_summary",
        "clinical_note model_summary",
        "clinical_note model_summary label",
        "id age clinical_note",
        "id clinical_note model_summary label hallucination_type",
    ],
)
@pytest.mark.parametrize("first_id", [5, 17])
def test_tables_and_lists_within_a_note_stay(tmp_path, header, first_id):
    others = {"ward": "A", "model_summary": "no acute findings", "label": "factual", "age": 40}
    columns = header.split()
    rows = [
        others | {"id": i, "clinical_note": note, "hallucination_type": ""}
        for i, note in enumerate(PASTED, first_id)
    ]
    path = write_csv(tmp_path / "a.csv", [[row[column] for column in columns] for row in rows], columns)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
    assert problems(path) == {}


@pytest.mark.parametrize(
    "rows",
    [
        ["id,clinical_note,ward", "1,Fever and cough.", "Start warfarin 5 mg.,A", "2,Knee.,B"],
        ["id,clinical_note,ward", "1,Fever and cough.", "Start warfarin, 5 mg.,A", "2,Knee.,B"],
        ["id,clinical_note", "1,Fever and cough.", "Start warfarin 5 mg.", "2,Knee."],
        ["id,clinical_note", "1,Fever and cough.", "Start warfarin, 5 mg.", "2,Knee."],
        ["id,clinical_note,ward", "1,Fever.", ",A", "2,Knee.,B"],
        ["id,clinical_note,ward", "1,Fever.", "Warfarin.,A", "2,Knee.,B"],
        ["clinical_note,ward", "Knee.,B", "Ear.,C", "Fever and cough.", "Start warfarin 5 mg.,A"],
    ],
)
def test_a_note_that_is_parted_by_a_line_break_is_refused(tmp_path, rows):
    """Half a note would be summarized."""
    (tmp_path / "a.csv").write_text("\n".join(rows))
    with pytest.raises(
        InputError, match=r"part of a row \(a line break outside quotes\?\): row [34]"
    ) as refused:
        read_notes(tmp_path / "a.csv")
    assert "arfarin" not in str(refused.value)


@pytest.mark.parametrize(
    "rows",
    [
        [
            "clinical_note,model_summary,label,hallucination_type",
            "Has pain.,Pain.,factual,",
            "pt c/o cough,Cough.,factual",
        ],
        [
            "id,clinical_note,model_summary,label,x",
            "MTS-1,Pain.,Pain.,factual,",
            "phase1_12,Cough.,Cough.,factual",
        ],
        [
            "clinical_note, model_summary, label",
            "Has had pain., Pain., factual",
            "pt c/o cough, Cough., factual",
        ],
    ],
)
def test_rows_that_lack_nothing_that_is_used_are_whole(tmp_path, rows):
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert len(read_rows(tmp_path / "a.csv")) == 2


def test_one_row_above_an_empty_line(tmp_path):
    (tmp_path / "a.csv").write_text("id,clinical_note\n1,Fever.\n\n")
    assert [note.text for note in read_notes(tmp_path / "a.csv")] == ["Fever."]


def test_empty_cells_may_be_left_out_at_the_end_of_a_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,clinical_note,ward,bed\n1,Fever.,A,2\n2,Cough.\n10,Rash.,B\n,Ear pain.,A,3\n,,\n")
    notes = read_notes(path, InferenceConfig(keep_columns=["bed"]))
    assert [(note.id, note.text) for note in notes] == [
        ("1", "Fever."),
        ("2", "Cough."),
        ("10", "Rash."),
        (None, "Ear pain."),
    ]


def test_a_broken_row_is_not_left_out_for_its_empty_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "id,clinical_note,model_summary,label\n1,Fever.,Fever.,factual\n2,Knee\npain.,Knee.,factual\n"
    )
    with pytest.raises(InputError, match="row 4: seems to be a part of a row"):
        read_rows(path, DataOptions(skip_empty=True))
