"""Sentences of clinical text, as spans and as numbered lines, by the rules of both versions."""

import hashlib
import itertools
import json
import textwrap

import pytest
from conftest import ROOT, SHARED_DATA
from hypothesis import given
from hypothesis import strategies as st

from sft.data.rows import read_rows
from sft.grounding.sentences import number_sentences, sentence_spans, split_sentences

WIDTHS = (60, 65, 72, 80)
VERSIONS = (1, 2)

clinical_text = st.text(st.sampled_from("aB1.?! \n\t-:;,()é[]S\u200f\U0001f600"), max_size=200) | st.text(
    max_size=200
)


@pytest.mark.parametrize("version", VERSIONS)
@given(text=clinical_text)
def test_spans_are_ordered_and_hold_every_visible_character(text, version):
    spans = sentence_spans(text, version)
    assert all(start < end for start, end in spans)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    outside = text
    for start, end in reversed(spans):
        assert text[start:end] == text[start:end].strip()
        outside = outside[:start] + outside[end:]
    assert not outside.strip()


@pytest.mark.parametrize("version", VERSIONS)
@given(text=clinical_text)
def test_numbered_lines_are_the_sentences(text, version):
    lines = number_sentences(text, version)
    assert [line.split(": ", 1)[1] for line in lines] == split_sentences(text, version)
    assert [line.split(":")[0] for line in lines] == [f"S{i}" for i in range(1, len(lines) + 1)]


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Fever of 38.5°C. Cough.", ["Fever of 38.5°C.", "Cough."]),
        (
            "Tested positive for influenza A. Recent contact.",
            ["Tested positive for influenza A.", "Recent contact."],
        ),
        ("Seen by Dr. Smith. Well.", ["Seen by Dr. Smith.", "Well."]),
        (
            "Aspirin 81 mg p.o. daily. Stop b.i.d. Metoprolol.",
            ["Aspirin 81 mg p.o. daily.", "Stop b.i.d.", "Metoprolol."],
        ),
        (
            "E. coli in urine. Severe MR. PR 96 ms. QT normal.",
            ["E. coli in urine.", "Severe MR.", "PR 96 ms.", "QT normal."],
        ),
        ("Meds:\nlisinopril 10 mg\nmetformin 500 mg", ["Meds:", "lisinopril 10 mg", "metformin 500 mg"]),
        ("1. Diabetes. A1c 8.2.\n2. HTN", ["1. Diabetes.", "A1c 8.2.", "2. HTN"]),
        (
            "A line that was wrapped by an old system after sixty characters or so and\ncontinues here.",
            ["A line that was wrapped by an old system after sixty characters or so and continues here."],
        ),
        ("Any pain? No. Room no. 4.", ["Any pain?", "No.", "Room no. 4."]),
        ('He said "stop." Then left.', ['He said "stop."', "Then left."]),
        ("", []),
    ],
)
def test_clinical_sentences(text, sentences):
    for version in VERSIONS:
        assert split_sentences(text, version) == sentences


def own_notes() -> list[str]:
    rows = read_rows(ROOT / "phase1_data" / "sft" / "test_set_processed.csv")
    return [row.clinical_note for row in rows if row.label == "factual"]


def wrap(text: str, width: int) -> str:
    """Each line of `text` as a mail program or an export wraps it."""
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
        for line in text.split("\n")
    )


def test_version_1_is_as_it_was():
    """Adapters were trained with it. The hash is of the sentences that 18a780b finds."""
    lines = '1. Gout, 2. HTN., 3. CKD\nDr. X at 3 p.m. No. 4\nTab. A q.4h. and so\non vs. B? no. "Why?" he... asked'
    texts = [*own_notes(), *(wrap(note, 60) for note in own_notes()), lines]
    spans = json.dumps([sentence_spans(text, 1) for text in texts])
    assert hashlib.sha256(spans.encode()).hexdigest()[:16] == "cdf13a3b5728665f"


@pytest.mark.parametrize(
    "text, sentences",
    [
        # Lists on one line
        ("1. Gout., 2. HTN., 3. CKD.", ["1. Gout.,", "2. HTN.,", "3. CKD."]),
        ("Plan: 1) rest, 2) ice, 3) NSAID.", ["Plan:", "1) rest,", "2) ice,", "3) NSAID."]),
        ("Gout, 2. Asthma, 3. Anemia.", ["Gout,", "2. Asthma,", "3. Anemia."]),
        ("HISTORY., Gout., Nonsmoker.", ["HISTORY.,", "Gout.,", "Nonsmoker."]),
        (
            "Smith Jr., 40, is well. Gravida: 1. Para: 1.",
            ["Smith Jr., 40, is well.", "Gravida: 1.", "Para: 1."],
        ),
        ("Gravida: 1. Para: 2. Well.", ["Gravida: 1.", "Para: 2.", "Well."]),
        ("1.  Gout.,2.  HTN.", ["1. Gout.,", "2. HTN."]),
        ("On March 3, 14. He", ["On March 3, 14.", "He"]),
        ("a. Stop aspirin. b. Start heparin.", ["a. Stop aspirin.", "b. Start heparin."]),
        # Dosing
        ("Tylenol q.4-6h. p.r.n. pain. Tab. Aspirin.", ["Tylenol q.4-6h. p.r.n. pain.", "Tab. Aspirin."]),
        ("Lasix 40 mg. p.o. b.i.d. Rest.", ["Lasix 40 mg. p.o. b.i.d.", "Rest."]),
        ("Gave 1.5 mg. Slept. Took one tab. Better.", ["Gave 1.5 mg.", "Slept.", "Took one tab.", "Better."]),
        (
            "Stage IV. In remission. Given p.o. For pain.",
            ["Stage IV.", "In remission.", "Given p.o.", "For pain."],
        ),
        ("METFORMIN 500 MG P.O. B.I.D. PRN. WELL.", ["METFORMIN 500 MG P.O. B.I.D. PRN.", "WELL."]),
        # Names, titles, numbers
        ("seen by dr. lee. mr. roe is well.", ["seen by dr. lee.", "mr. roe is well."]),
        ("DR. LEE SAW HER. SEVERE MR. EF 30.", ["DR. LEE SAW HER.", "SEVERE MR.", "EF 30."]),
        ("John D. Smith has hepatitis C. Stable.", ["John D. Smith has hepatitis C.", "Stable."]),
        ("Pain? No. 4 days ago. Bed No. 4 vs. 5.", ["Pain?", "No.", "4 days ago.", "Bed No. 4 vs. 5."]),
        ("Seen Jan. 5. Temp. 38.2 now.", ["Seen Jan. 5.", "Temp. 38.2 now."]),
        ("Well... maybe. 'Why?' she asked.", ["Well... maybe.", "'Why?' she asked."]),
        # Wrapped lines
        ("The patient has no\nfever. Rash: none", ["The patient has no fever.", "Rash: none"]),
        ("- start insulin for\n  diabetes\n- rest", ["- start insulin for diabetes", "- rest"]),
        ("Seen in the clinic by Dr.\nLee today.", ["Seen in the clinic by Dr. Lee today."]),
        (
            "A WOMAN OF 58 YEARS WHO CAME TO THE EMERGENCY DEPARTMENT OF THE\nHOSPITAL WITH FEVER AND COUGH.",
            [
                "A WOMAN OF 58 YEARS WHO CAME TO THE EMERGENCY DEPARTMENT OF THE HOSPITAL WITH FEVER AND COUGH."
            ],
        ),
        # Lines that are items
        ("no fever\nno cough\nno pain", ["no fever", "no cough", "no pain"]),
        ("smoker: no\nalcohol: yes", ["smoker: no", "alcohol: yes"]),
        ("Patient: No\nDoctor: Any pain?", ["Patient: No", "Doctor: Any pain?"]),
        (
            "Pneumonia of the right lower lobe, improving on ceftriaxone and a macrolide\nDiabetes\nGout",
            [
                "Pneumonia of the right lower lobe, improving on ceftriaxone and a macrolide",
                "Diabetes",
                "Gout",
            ],
        ),
    ],
)
def test_sentences_of_version_2(text, sentences):
    assert split_sentences(text, 2) == sentences
    assert split_sentences(text) == sentences


def test_notes_of_the_sample_data_have_the_same_sentences_in_both_versions():
    """So that their citations are right in both."""
    for note in own_notes():
        assert sentence_spans(note, 1) == sentence_spans(note, 2)


@pytest.mark.parametrize("width", WIDTHS)
def test_wrapped_lines_do_not_change_the_sentences(width):
    notes = own_notes()
    n_same = sum(split_sentences(wrap(note, width)) == split_sentences(note) for note in notes)
    # Where a line ends before a name, "HR 98" / "Mild oedema" may be two items
    assert n_same >= 0.8 * len(notes)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no ../shared/data")
def test_error_rates_on_held_out_notes(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from sentence_boundaries import LABELS, read_texts, report

    labels = json.loads(LABELS.read_text())
    every = list(read_texts(SHARED_DATA, "held_out").items())
    texts = dict(every[::20]) | {text_id: text for text_id, text in every if text_id in labels}
    report("version 2", texts, labels, sentence_spans)
    line = capsys.readouterr().out
    wrapped, labeled = (float(line.split(f"{measure}:")[1].split()[0]) for measure in ("wrapped", "labeled"))
    assert wrapped < 0.5
    assert labeled < 0.5
