"""Parts of a note, the training pairs made of them, and the shorthand that rows teach."""

import csv
import json

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.grounding.parts import learn_shorthand, make_parts, patient_line, training_pairs
from sft.grounding.selector import Quoted, Selector, quote
from sft.grounding.sentences import split_sentences

NOTE = (
    "Dear Dr Jones,\nMrs Hill, 71F, has two weeks of cough. Her sister takes lithium.\n"
    "Ultrasound showed a right effusion of 4 cm. It was drained.\nPlan:\n- chest film in six weeks\n"
)


def rows() -> list[tuple[str, str]]:
    with open(ROOT / "phase1_data" / "sft" / "train_set_processed.csv", encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["label"] == "factual"]
    return [(row["clinical_note"], row["model_summary"]) for row in found]


@pytest.mark.parametrize(
    "note, line",
    [
        (NOTE, "Patient: 71F."),
        (
            "Seen today. This is a 44-year-old man with gout, well.",
            "Patient: 44-year-old man.",
        ),
        (
            "8-year-old boy, mother in the room. Her sister is a 30-year-old nurse.",
            "Patient: 8-year-old boy.",
        ),
        ("Her sister is a 30-year-old nurse. Cough.", ""),
        ("Cough. Fever.", ""),
        ("", ""),
    ],
)
def test_the_line_that_says_who_the_patient_is(note, line):
    assert patient_line(note) == line


def test_a_part_is_one_sentence_with_what_it_refers_to():
    quoted = [
        Quoted("Ultrasound showed a right effusion of 4 cm.", (4,)),
        Quoted("It was drained.", (5,)),
        Quoted("Plan: chest film in six weeks.", (6, 7)),
    ]
    first, second = make_parts(NOTE, quoted)
    assert first.quoted == "Ultrasound showed a right effusion of 4 cm. It was drained."
    assert first.text == f"Patient: 71F.\n{first.quoted}"
    assert first.note_sentences == (4, 5)
    assert second.note_sentences == (6, 7)
    # A part that names the patient needs no line
    assert make_parts(NOTE, [Quoted("Mrs Hill, 71F, has two weeks of cough.", (2,))])[0].text.startswith(
        "Mrs"
    )


def test_pairs_hold_what_their_sentence_says():
    summary = (
        "A 71-year-old woman has two weeks of cough, and a right effusion of 4 cm was shown by ultrasound; "
        "a chest film is due in six weeks. [Evidence: S2; Conf: 0.9] She was given rituximab for vasculitis."
    )
    pairs, left_out = training_pairs(NOTE, summary)
    assert [sentence for _, sentence in pairs] == [
        "A 71-year-old woman has two weeks of cough.",
        "A right effusion of 4 cm was shown by ultrasound.",
        "A chest film is due in six weeks.",
    ]
    assert [part.note_sentences for part, _ in pairs] == [(2,), (4,), (7,)]
    assert sum(left_out.values()) == 1


def test_what_the_note_lacks_is_trimmed_and_a_wrong_number_left_out():
    pairs, reasons = training_pairs(
        NOTE, "She has two weeks of cough, with haemoptysis and unexplained pyrexia."
    )
    assert [sentence for _, sentence in pairs] == ["She has two weeks of cough."]
    assert reasons["trimmed"] == 1
    assert training_pairs(NOTE, "Ultrasound showed a right effusion of 9 cm.")[0] == []


def test_most_training_sentences_make_pairs():
    n_sentences, pairs = 0, []
    for note, summary in rows():
        n_sentences += len(split_sentences(summary))
        pairs += [(note, *pair) for pair in training_pairs(note, summary)[0]]
    assert 0.8 * n_sentences < len(pairs)
    for note, part, _ in pairs[::5]:
        assert 1 <= len(part.note_sentences) <= 3
        assert max(part.note_sentences) <= len(split_sentences(note))


def test_shorthand_is_learned_where_rows_agree():
    agreeing = [("AF, creat 212.", "The atrial fibrillation and creatinine 212.")] * 2
    assert learn_shorthand(agreeing) == {"af": ["atrial fibrillation"], "creat": ["creatinine"]}
    assert learn_shorthand(agreeing[:1]) == {}
    assert learn_shorthand([("Stop it.", "It was stopped.")] * 3) == {}
    table = learn_shorthand(rows())
    assert json.loads(json.dumps(table)) == table
    assert table["af"] == ["atrial fibrillation"]


@given(st.text(max_size=100), st.text(max_size=100))
@settings(max_examples=60, deadline=None)
def test_any_text_makes_parts_and_pairs(note, summary):
    pairs, _ = training_pairs(note, summary)
    learn_shorthand([(note, summary)] * 2)
    selector = Selector({}, 1.0, 60.0, 0.0, 60.0, 0.0, False, 0)
    quoted = quote(note, selector)
    parts = make_parts(note, quoted)
    assert " ".join(part.quoted for part in parts) == " ".join(one.text for one in quoted)
    assert all(sentence.endswith(".") for _, sentence in pairs)
